"""The result files, and tasks that are timed in interleaved rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.results import Results, compare


def task(first_s: float, seconds: float) -> Iterator[float]:
    yield first_s
    while True:
        yield seconds


class InThisProcess:
    """Stands for `OwnProcess`, without one."""

    def __init__(self, name: str, function: object, *arguments: float) -> None:
        self._answers = task(99.0, 2.0 if name == "slow" else arguments[0])

    def next(self) -> float:
        return next(self._answers)

    def close(self) -> None:
        pass


def test_tasks_are_compared_round_by_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.results.OwnProcess", InThisProcess)
    monkeypatch.setattr("sys.argv", ["x", "--data", "/secret/place"])
    results = Results(name="x", out=tmp_path / "new", hidden={"/secret/place": "data"})
    compare(
        results, {"fast": task, "slow": task}, (0.5,), 2, title="Title", task="Ten images in /secret/place.",
        notes="Notes.", num_images=10, peers={"fast": ("slow",)},
    )  # fmt: skip
    document = json.loads((tmp_path / "new" / "x.json").read_text())
    assert document["command"] == "python -m benchmarks.x --data data"
    assert (document["rounds"], document["seconds"]) == (2, {"fast": [0.5, 0.5], "slow": [2.0, 2.0]})
    page = (tmp_path / "new" / "x.md").read_text()
    assert "| fast | 20 [20, 20] | 4.00 [4.00, 4.00] × slow |\n| slow | 5 [5, 5] |  |\n" in page
    assert "Ten images in data." in page
    log = (tmp_path / "new" / "x.log").read_text()
    assert log.startswith("$ python -m benchmarks.x --data data\nround 0: slow: 99.000 s (warm-up, not counted)\n")
