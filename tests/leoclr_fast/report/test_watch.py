"""A run in the terminal: as it is, and while it goes on."""

from __future__ import annotations

import contextlib
import io
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from leoclr_fast.report.metrics_file import MetricsFile
from leoclr_fast.report.run_record import read_run
from leoclr_fast.report.watch import sparkline, watch
from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.written_run import end, knn, start, step_record, written_run

STEPS = [step_record(step) for step in range(10, 101, 10)]


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def append(run: Path, *records: dict[str, Any]) -> None:
    with open(RunFolder(run).metrics_file, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_sparklines() -> None:
    assert sparkline(np.array([0.0, 1, 2, 3, 4, 5, 6, 7])) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.array([1.0, math.nan, 3.0])) == "▁ █"
    assert sparkline(np.array([2.0, 2.0])) == "▄▄"
    assert sparkline(np.arange(400.0), width=8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.array([])) == ""
    assert sparkline(np.array([math.nan])) == ""


def test_once_shows_the_newest_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    records = [start(), knn(0, 12.5), *STEPS, knn(100, 31.25), end(100, "stopped", reason="stopped by SIGTERM")]
    run = written_run(tmp_path / "run", records)
    document, output = succeeded(capsys, "watch", run, "--once")
    assert document == {
        "run": str(run), "state": "stopped", "step": 100, "total_steps": 552.0, "loss": 5.1, "knn_top1": 31.25,
        "images_per_s": 64.0, "data_wait_fraction": 0.05, "seconds_left": None,
    }  # fmt: skip
    assert "Stopped after step 100 of 552" in output
    assert "18.1 %" in output
    for line in ("loss", "5.1000", "31.25 %", "▁", "█", "data wait", "5.0 %"):
        assert line in output


def test_the_time_left_is_that_of_the_speed_so_far(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", [start(), *STEPS])
    with RunFolder(run).locked():
        assert read_run(run).seconds_left == pytest.approx(452)  # a second a step
    assert math.isnan(read_run(run).seconds_left)  # it was killed


@pytest.mark.parametrize("console", [terminal(), Console(file=io.StringIO(), width=120)], ids=["terminal", "pipe"])
def test_it_follows_a_run_to_its_end(tmp_path: Path, console: Console) -> None:
    """Another process writes, here a thread; half a line is waited for."""
    run = written_run(tmp_path / "run", [start(), *STEPS[:2]])

    def write() -> None:
        with RunFolder(run).locked():
            held.set()
            deadline = time.monotonic() + 60
            while "after step 20" not in shown(console) and time.monotonic() < deadline:
                time.sleep(0.01)
            for record in STEPS[2:]:
                line = json.dumps(record) + "\n"
                for part in (line[:50], line[50:]):
                    with open(RunFolder(run).metrics_file, "a") as file:
                        file.write(part)
                    time.sleep(0.02)
            append(run, end(100, "finished"))

    held = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    assert held.wait(10)
    document = watch(run, console, every_s=0.03)
    writer.join()
    assert (document["state"], document["step"], document["loss"]) == ("finished", 100, 5.1)
    text = shown(console)
    assert "Running, after step 20 of 552" in text
    assert "Finished after step 100" in text
    assert "The queue fills until step 32" in text  # at the beginning


@pytest.mark.parametrize("when", ["it ends", "it begins"])
def test_a_run_that_changes_while_it_is_read_was_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The log is read between two moments; in one of them only a process holds the folder."""
    run = written_run(tmp_path / "run", [start(), *STEPS])
    read_log = MetricsFile.update
    with contextlib.ExitStack() as held:

        def update(metrics: MetricsFile) -> bool:
            changed = read_log(metrics)
            if when == "it ends":
                append(run, end(100, "finished"))
                held.close()
            else:
                held.enter_context(RunFolder(run).locked())
            return changed

        if when == "it ends":
            held.enter_context(RunFolder(run).locked())
        monkeypatch.setattr(MetricsFile, "update", update)
        assert read_run(run).state.kind == "running"
        monkeypatch.setattr(MetricsFile, "update", read_log)
        assert read_run(run).state.kind == ("finished" if when == "it ends" else "running")
