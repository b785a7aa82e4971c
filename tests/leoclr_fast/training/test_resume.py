"""A killed run continues exactly: losses and weights are bit-identical to an uninterrupted run's."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from leoclr_fast.run.checkpoint import list_checkpoints, load_checkpoint, step_of
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.forked_runs import ForkedRun, ForkedRuns, finished_steps, num_starts_of
from tests.leoclr_fast.tiny_flags import TINY_FLAGS
from tests.leoclr_fast.written_run import start, step_record, written_run

NUM_STEPS = 18  # six epochs of three steps
FLAGS = [
    *TINY_FLAGS,
    "--epochs=6",
    "--views.blur-probability=0.5",
    "--monitor.knn-every-epochs=3",
    "--monitor.checkpoint-every-steps=2",
]


def start_run(runs: ForkedRuns, data: Path, out: Path, ranks: int = 1, extra: tuple[str, ...] = ()) -> ForkedRun:
    arguments = ["pretrain", "leoclr_demo", f"--data={data}", f"--out={out}", *FLAGS, *extra]
    return runs.start(arguments, out.with_suffix(".log"), ranks=ranks)


def run_and_kill(run: ForkedRun, out: Path, kill_at: int) -> None:
    """SIGKILL the run, and all its processes, as soon as it has logged step `kill_at`."""
    run.wait_for_step(out, kill_at)
    assert run.code() is None, run.output()
    run.kill_all()
    run.wait()


def run_to_the_end(run: ForkedRun) -> None:
    assert run.wait() == 0, run.output()


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


def test_steps_that_a_run_logged_before_it_was_killed_are_not_those_of_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    written_run(out, [start(), step_record(1), step_record(2), step_record(3)], tail='{"kind": "st')
    before = num_starts_of(out)
    assert (before, finished_steps(out), finished_steps(out, before + 1)) == (1, 3, 0)
    written_run(out, [start(), step_record(1), step_record(2), start(2), step_record(3), start(3), step_record(4)])
    assert finished_steps(out, before + 1) == 4


@pytest.mark.timeout(600)
def test_sigkill_at_five_random_steps_changes_nothing(runs: ForkedRuns, tiny_data: Path, tmp_path: Path) -> None:
    """Killed five times on its way, in the middle of epochs too: each time it continues from its last checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_the_end(start_run(runs, tiny_data, whole))
    kill_points = sorted(random.Random(0).sample(range(2, NUM_STEPS - 2), 5))
    assert any(step % 3 for step in kill_points)
    for kill_at in kill_points:
        run_and_kill(start_run(runs, tiny_data, killed), killed, kill_at)
        assert not (killed / "final.safetensors").exists()
    run_to_the_end(start_run(runs, tiny_data, killed))
    assert_identical(killed, whole)


@pytest.mark.timeout(300)
def test_sigterm_saves_and_the_same_command_continues(runs: ForkedRuns, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_run(runs, tiny_data, out, extra=("--epochs=200",))
    run.wait_for_step(out, 5)
    os.kill(run.process, signal.SIGTERM)
    assert run.wait(60) == 130, run.output()
    assert "stopped by SIGTERM after step" in run.output()
    assert "Traceback" not in run.output()
    newest = list_checkpoints(out / "checkpoints")[-1]
    assert load_checkpoint(newest)["step"] == finished_steps(out)


@pytest.mark.timeout(600)
def test_another_number_of_ranks_continues_at_the_same_step(runs: ForkedRuns, tiny_data: Path, tmp_path: Path) -> None:
    """As after an elastic restart, in the middle of an epoch each time: two ranks, then three, then one. In float64 and
    with batch statistics over all of them, every loss, and so every image of every step, is the undisturbed run's.
    """
    flags = ("--precision=fp64", "--method.query-batchnorm=sync", "--method.key-batchnorm=sync")
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    run_to_the_end(start_run(runs, tiny_data, whole, extra=flags))
    for ranks, kill_at in ((2, 5), (3, 10)):
        run_and_kill(start_run(runs, tiny_data, changed, ranks=ranks, extra=flags), changed, kill_at)
    resumed_at = step_of(list_checkpoints(changed / "checkpoints")[-1])
    last = start_run(runs, tiny_data, changed, extra=flags)
    run_to_the_end(last)
    assert f"resuming from {changed}/checkpoints/step-{resumed_at:08d}" in last.output()
    expected = [(record["step"], record["loss"]) for record in RunFolder(whole).read_metrics("step")]
    found = [(record["step"], record["loss"]) for record in RunFolder(changed).read_metrics("step")]
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, NUM_STEPS + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-9)


@pytest.mark.parametrize(
    ("knn", "every_epochs", "steps"),
    [("auto", 1, [3, 6, 9]), ("auto", 0, []), ("on", 0, [0, 10]), ("on", 1, [0, 3, 6, 9, 10]), ("off", 1, [])],
)
def test_knn_of_a_run_that_pauses(
    knn: str, every_epochs: int, steps: list[int], tiny_data: Path, tmp_path: Path
) -> None:
    """None at the start and at the pause, in the middle of the fourth epoch, unless it is asked for."""
    config = tiny_config(monitor__knn=knn, monitor__knn_every_epochs=every_epochs, result__epochs=6)
    pretrain(config, tiny_data, tmp_path / "run", max_steps=10)
    assert [record["step"] for record in RunFolder(tmp_path / "run").read_metrics("knn")] == steps
