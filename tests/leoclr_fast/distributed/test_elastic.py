"""torchrun's elastic agents, of which one comes later, on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.forked_runs import finished_steps
from tests.leoclr_fast.held_port import held_port
from tests.leoclr_fast.training.test_resume import FLAGS

LIMIT_S = 150.0
EPOCHS = 60
STEPS = 3 * EPOCHS


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_machine_that_comes_later_is_taken_in(tiny_data: Path, tmp_path: Path) -> None:
    """Both go on as two ranks, from the checkpoint; every step is logged once, and nothing else is lost."""
    with held_port() as port:
        joins_later(tiny_data, tmp_path, port)


def joins_later(tiny_data: Path, tmp_path: Path, port: int) -> None:
    out = tmp_path / "run"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=100"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test", "--monitor-interval=0.5"]
    agent += ["-m", "leoclr_fast", "pretrain", "leoclr_demo", f"--data={tiny_data}", f"--out={out}", *FLAGS]
    agent += [f"--epochs={EPOCHS}", "--monitor.knn-every-epochs=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(name: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / name, "wb") as log:
            return subprocess.Popen(agent, stdout=log, stderr=subprocess.STDOUT, env=environment)

    first = start("first.log")
    agents = [first]
    try:
        deadline = time.monotonic() + LIMIT_S
        while finished_steps(out) < 4:
            assert time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        agents.append(start("second.log"))
        codes = [process.wait(LIMIT_S) for process in agents]
    finally:
        for process in agents:
            process.kill()
    logs = "".join((tmp_path / name).read_text() for name in ("first.log", "second.log"))
    assert codes == [0, 0], logs
    assert "cpu x 2 ranks" in logs
    assert "resuming from" in logs
    assert [record["step"] for record in RunFolder(out).read_metrics("step")] == list(range(1, STEPS + 1))
