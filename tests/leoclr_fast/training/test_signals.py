"""A signal is obeyed wherever a run is; what was finished is kept, and the same command goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import leoclr_fast.evaluate.knn
import leoclr_fast.training.setup
from dataset_tools.stop_signals import StoppedAtOnce, StoppedBySignalError
from leoclr_fast.run.checkpoint import list_checkpoints
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from leoclr_fast.training.run_log import RunLog
from leoclr_fast.training.step import TrainingStep
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.long_call import LONG_S, long_call


@pytest.mark.parametrize(
    ("owner", "phase", "call", "error", "steps_saved"),
    [
        (leoclr_fast.training.setup, "open_source", 1, StoppedAtOnce, None),  # 1.28 million files
        (leoclr_fast.evaluate.knn, "extract_features", 1, StoppedAtOnce, None),  # before the first step
        (TrainingStep, "__call__", 1, StoppedAtOnce, None),  # compiles
        (leoclr_fast.evaluate.knn, "extract_features", 3, StoppedBySignalError, 6),  # after two epochs
        (leoclr_fast.evaluate.knn, "extract_features", 5, StoppedAtOnce, 9),  # at the end
        (RunLog, "_write_report", 2, StoppedAtOnce, 9),  # at the end
    ],
)
def test_a_signal_is_obeyed_in_every_phase(
    monkeypatch: pytest.MonkeyPatch,
    tiny_data: Path,
    tmp_path: Path,
    owner: Any,
    phase: str,
    call: int,
    error: type[BaseException],
    steps_saved: int | None,
) -> None:
    """The phase takes a minute from its `call` on; and when it is over, the same command has the result."""
    config, out = tiny_config(result__epochs=3, monitor__checkpoint_every_epochs=3), tmp_path / "run"
    with monkeypatch.context() as changed:
        changed.setattr(owner, phase, long_call(getattr(owner, phase), call))
        start = time.monotonic()
        with pytest.raises(error, match="stopped by SIGTERM"):
            pretrain(config, tiny_data, out)
        assert time.monotonic() - start < LONG_S
    saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(RunFolder(out).checkpoints)]
    assert saved[-1:] == ([] if steps_saved is None else [steps_saved])
    summary = pretrain(config, tiny_data, out)
    assert (summary["steps"], summary["complete"]) == (9, True)
    assert [record["step"] for record in RunFolder(out).read_metrics("knn")] == [0, 6, 9]
