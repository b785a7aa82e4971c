"""A run folder from anybody: any field may hold anything, and page, table and `watch` are made all the same."""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

import leoclr_fast.report.page
from dataset_tools.terminal import PlainConsole
from leoclr_fast.report.evaluation_table import evaluation_table
from leoclr_fast.report.page import page_of
from leoclr_fast.report.plots import DrawnPlot, Plot
from leoclr_fast.report.run_record import read_run
from leoclr_fast.report.watch import watch
from tests.leoclr_fast.written_run import end, knn, start, step_record, written_run

STRANGE: list[Any] = [
    None, True, -1, 0, 10**400, 1e308, float("nan"), -float("inf"), "", "x", "\udcff", "\x1b[2J", [], [[]], {}, {"": 1},
    "9" * 5000, [{"a": []}],
]  # fmt: skip
FILES: dict[str, list[Any]] = {
    "environment.json": [{"versions": {"torch": "2"}, "device": "cpu", "world_size": 2, "git_commit": "a" * 40}],
    "summary.json": [{"complete": True, "steps": 92, "epochs": 2.0, "unreadable_images": {"a": "b"}}],
    "data.json": [{
        "path": "p", "fingerprint": "f", "images": 60, "classes": ["c"], "num_classes": 1, "note": "n",
        "quarantined": {"images": 1, "listed": [{"name": "a", "reason": "r"}]},
        "preview": [{"name": "a", "class": "c"}],
    }],
    "metrics.jsonl": [
        start(method="M", num_keys=2, baseline="mocov2", metrics=["m"], last_step=92), knn(0, 9.0), step_record(46),
        {"kind": "warning", "step": 46, "text": "t"}, knn(92, 12.0), end(92, "stopped", reason="r", where="w"),
    ],
    "evaluations.jsonl": [
        {"evaluator": "linear", "top1": 40.0, "settings": {"lr": 3.0, "seed": 1, "milestones": [6, 8]}, "unix_s": 1.7e9,
         "classes": 10, "train_images": 50, "val_images": 10, "weights": "w"},
        {"evaluator": "transfer", "metric": "top1", "top1": 4.0, "settings": {"dataset": "pets", "percent": 1.0}},
    ],
}  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document and each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def write(run: Path, name: str, documents: list[Any]) -> None:
    (run / name).write_text("".join(json.dumps(document) + "\n" for document in documents))


def read_everything(run: Path) -> None:
    record = read_run(run)
    assert b"\x1b" not in page_of([record]).encode()
    page_of([record, read_run(run)])
    console = PlainConsole(file=io.StringIO(), width=100)
    watch(run, console, once=True)
    evaluation_table([run]).as_markdown()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def undrawn(plot: Plot, _: int) -> DrawnPlot:
        return DrawnPlot(plot, Markup(""), {})  # matplotlib takes most of the time

    monkeypatch.setattr(leoclr_fast.report.page, "drawn", undrawn)
    run = written_run(tmp_path / "run", [])
    for name, documents in FILES.items():
        write(run, name, documents)
    read_everything(run)
    assert read_run(run).problems == []
    return run


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_field_may_hold_anything(run: Path, data: st.DataObject) -> None:
    path = run / data.draw(st.sampled_from(["config.yaml", *FILES]))
    before = path.read_text()
    documents = [yaml.safe_load(before)] if path.suffix == ".yaml" else copy.deepcopy(FILES[path.name])
    container, key = data.draw(st.sampled_from(list(places(documents))))
    container[key] = data.draw(st.sampled_from(STRANGE))
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(documents[0]))
    else:
        write(run, path.name, documents)
    try:
        read_everything(run)
    except ValueError as error:
        assert str(error).startswith("nothing was evaluated")  # noqa: PT017
    finally:
        path.write_text(before)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"", b"x" * (1 << 20)])
def test_files_that_are_no_document(run: Path, content: bytes) -> None:
    for name in ("config.yaml", *FILES):
        (run / name).write_bytes(content)
    problems = read_run(run).problems
    assert len(problems) == (4 if content == b"" else 5)
    assert max(map(len, problems)) < 1000
    page_of([read_run(run)])


def test_pipes_are_not_waited_for(run: Path) -> None:
    for name in ("config.yaml", ".lock", "preview.png", *FILES):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    assert "is a named pipe, and not a file" in "".join(read_run(run).problems)
