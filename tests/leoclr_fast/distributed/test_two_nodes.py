"""A run on two machines, which are two network namespaces: the same as on one, and what happens when one is cut off."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoclr_fast.run.checkpoint import list_checkpoints, step_of
from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.network_namespaces import INTERFACE, Node, NoNamespacesError, two_nodes
from tests.leoclr_fast.tiny_flags import TINY_FLAGS

END_WITHIN_S = 60
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
MEASURED = ("step", "epoch", "loss", "positive_similarity", "negative_similarity", "gradient_norm", "lr")


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with two_nodes() as both:
            yield both
    except NoNamespacesError as error:
        pytest.skip(str(error))


def on_both(nodes: tuple[Node, Node], data: Path, out: Path, logs: Path, *flags: str) -> list[subprocess.Popen[bytes]]:
    """torchrun on each node, as docs/launch.md has it; their output goes to `logs/HOST.log`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0"]
    torchrun += [f"--master-addr={nodes[0].host}", "--master-port=29500"]
    started = []
    for number, node in enumerate(nodes):
        words = [*torchrun, f"--node-rank={number}", *pretrain(data, out, *flags)]
        with open(logs / f"{node.host}.log", "ab") as log:
            process = subprocess.Popen(
                node.command(*words), env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": INTERFACE}, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        started.append(process)
    return started


def pretrain(data: Path, out: Path, *flags: str) -> list[str]:
    return ["-m", "leoclr_fast", "pretrain", "leoclr_demo", f"--data={data}", f"--out={out}", *TINY_FLAGS, *flags]


def codes_of(processes: list[subprocess.Popen[bytes]], limit_s: float) -> list[int]:
    deadline = time.monotonic() + limit_s
    return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]


def told_by(logs: Path) -> dict[str, str]:
    return {log.stem: log.read_text(errors="replace") for log in sorted(logs.glob("*.log"))}


def measured(out: Path, kind: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in MEASURED if name in row} for row in RunFolder(out).read_metrics(kind)]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_machines_train_as_two_ranks_of_one(nodes: tuple[Node, Node], tiny_data: Path, tmp_path: Path) -> None:
    """The sums of two ranks are the same over a cable as within a machine: not a bit differs."""
    together, apart, flags = tmp_path / "together", tmp_path / "apart", ("--epochs=2", "--monitor.knn-every-epochs=1")
    assert codes_of(on_both(nodes, tiny_data, apart, tmp_path, *flags), 120) == [0, 0], told_by(tmp_path)
    one_machine = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*one_machine, *pretrain(tiny_data, together, *flags)], env=ENVIRONMENT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = measured(apart, "step")
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert steps == measured(together, "step")
    assert len({row["loss"] for row in steps}) == 6
    assert RunFolder(apart).final_weights.read_bytes() == RunFolder(together).final_weights.read_bytes()
    assert json.loads((apart / "environment.json").read_text())["world_size"] == 2


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_machine_that_is_cut_off_ends_the_run_on_both_and_the_run_goes_on_later(
    nodes: tuple[Node, Node], tiny_data: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    logs.mkdir()
    flags = ("--epochs=2000", "--monitor.knn-every-epochs=0", "--monitor.checkpoint-every-steps=5")
    flags += ("--monitor.collective-timeout-s=20",)
    running = on_both(nodes, tiny_data, out, logs, *flags)
    deadline = time.monotonic() + 120
    while len(list_checkpoints(out / "checkpoints")) < 2:
        assert all(process.poll() is None for process in running), told_by(logs)
        assert time.monotonic() < deadline, told_by(logs)
        time.sleep(0.05)
    nodes[1].pull_cable()
    began = time.monotonic()
    codes = codes_of(running, END_WITHIN_S)
    print(f"both machines had ended {time.monotonic() - began:.0f} s after the cable was pulled")
    told = told_by(logs)
    assert all(codes), told
    assert re.search(r"error: lost rank 1 on node-b \(process \d+\) in step \d+", told["node-a"]), told
    assert re.search(r"error: the connection to other ranks broke in step \d+, and the store", told["node-b"]), told
    assert all("the same command continues" in words for words in told.values())
    assert not RunFolder(out).final_weights.exists()

    newest = step_of(list_checkpoints(out / "checkpoints")[-1])
    assert newest >= 5
    nodes[1].plug_cable()
    goal = newest + 4
    codes = codes_of(on_both(nodes, tiny_data, out, logs, *flags, f"--max-steps={goal}"), 120)
    assert codes == [0, 0], told_by(logs)
    assert [row["step"] for row in measured(out, "step")] == list(range(1, goal + 1))
