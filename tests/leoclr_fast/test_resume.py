"""A killed run continues exactly: losses and weights are bit-identical to an uninterrupted run's."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from leoclr_fast.checkpoint import list_checkpoints, load_checkpoint
from leoclr_fast.run_folder import RunFolder

NUM_STEPS = 24  # eight epochs of three steps
FLAGS = [
    "--epochs=8",
    "--batch-size=12",
    "--backbone.width-multiplier=0.0625",
    "--method.queue-size=40",
    "--method.projection-dim=8",
    "--method.key-batchnorm-group=4",
    "--views.image-size=16",
    "--views.blur-probability=0.5",
    "--monitor.knn-k=3",
    "--monitor.knn-every-epochs=3",
    "--monitor.log-every-steps=1",
    "--monitor.checkpoint-every-steps=2",
    "--device=cpu",
]


def command(data: Path, out: Path, ranks: int = 1, extra: tuple[str, ...] = ()) -> list[str]:
    program = [sys.executable, "-m", "leoclr_fast"]
    if ranks > 1:
        program = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *("-m", "leoclr_fast"),
        ]
    return [*program, "pretrain", "leoclr_demo", f"--data={data}", f"--out={out}", *FLAGS, *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finished_steps(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    if not metrics.exists():
        return 0
    lines = metrics.read_text().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    return max(steps, default=0)


def run_and_kill(arguments: list[str], out: Path, kill_at: int) -> None:
    """Start the run and SIGKILL it, and all its processes, as soon as it has logged step `kill_at`."""
    with subprocess.Popen(
        arguments,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while finished_steps(out) < kill_at and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        died_by_itself = process.poll() is not None
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    assert not died_by_itself, errors


def run_to_the_end(arguments: list[str]) -> None:
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def results(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics without timings, and the last checkpoint."""
    folder = RunFolder(out)
    timings = ("images_per_s", "images_per_s_now", "data_wait_fraction", "seconds_left", "unix_s")
    records = [
        {key: value for key, value in record.items() if key not in timings}
        for kind in ("step", "knn")
        for record in folder.read_metrics(kind)
    ]
    return records, load_checkpoint(list_checkpoints(folder.checkpoints)[-1])


def assert_identical(interrupted: Path, uninterrupted: Path) -> None:
    records, state = results(interrupted)
    expected_records, expected = results(uninterrupted)
    assert [r["step"] for r in expected_records if "loss" in r] == list(range(1, NUM_STEPS + 1))
    assert records == expected_records
    assert state["step"] == expected["step"] == NUM_STEPS
    assert state["method"].keys() == expected["method"].keys()
    for name, tensor in expected["method"].items():
        assert torch.equal(state["method"][name], tensor), name
    for index, slot in expected["optimizer"]["state"].items():
        assert torch.equal(state["optimizer"]["state"][index]["momentum_buffer"], slot["momentum_buffer"])
    final, expected_final = (RunFolder(out).final_weights.read_bytes() for out in (interrupted, uninterrupted))
    assert final == expected_final


@pytest.mark.timeout(600)
def test_sigkill_at_five_random_steps_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """Killed five times on its way, in the middle of epochs too: each time it continues from its last checkpoint."""
    run_to_the_end(command(tiny_data, tmp_path / "whole"))
    kill_points = sorted(random.Random(0).sample(range(2, NUM_STEPS - 2), 5))
    assert any(step % 3 for step in kill_points)
    for kill_at in kill_points:
        run_and_kill(command(tiny_data, tmp_path / "killed"), tmp_path / "killed", kill_at)
        assert not (tmp_path / "killed" / "final.safetensors").exists()
    run_to_the_end(command(tiny_data, tmp_path / "killed"))
    assert_identical(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.timeout(600)
def test_two_ranks_killed_in_the_middle_of_an_epoch(tiny_data: Path, tmp_path: Path) -> None:
    """The same under torchrun with gloo, with shuffled batch-norm between the ranks."""
    run_to_the_end(command(tiny_data, tmp_path / "whole", ranks=2))
    for kill_at in (7, 16):
        run_and_kill(command(tiny_data, tmp_path / "killed", ranks=2), tmp_path / "killed", kill_at)
    run_to_the_end(command(tiny_data, tmp_path / "killed", ranks=2))
    assert_identical(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.timeout(300)
def test_sigterm_saves_and_the_same_command_continues(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(
        command(tiny_data, out, extra=("--epochs=200",)), env=environment(), stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while finished_steps(out) < 5 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGTERM after step" in errors
    assert "Traceback" not in errors
    newest = list_checkpoints(out / "checkpoints")[-1]
    assert load_checkpoint(newest)["step"] == finished_steps(out)
