"""Checkpoints beside the training: what is copied when, what is kept, and errors that come later."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from leoclr_fast.run import checkpoint_writer
from leoclr_fast.run.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from leoclr_fast.run.checkpoint_writer import CheckpointWriter
from leoclr_fast.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def state(step: int) -> dict[str, Any]:
    return {"step": step, "nested": [{"weights": torch.full((3,), float(step))}]}


def kept(folder: RunFolder) -> list[str]:
    return [path.name for path in list_checkpoints(folder.checkpoints)]


def names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def test_steps_that_follow_do_not_change_what_is_saved(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing begins after the weights have changed."""
    may_write, write = threading.Event(), checkpoint_writer.save_checkpoint

    def write_later(*given: Any, **options: Any) -> None:
        assert may_write.wait(30)
        write(*given, **options)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", write_later)
    writer, training = CheckpointWriter(folder, keep=2), state(5)
    writer.save(5, training)
    training["nested"][0]["weights"].zero_()
    may_write.set()
    writer.flush()
    saved = load_checkpoint(folder.checkpoints / "step-00000005")
    assert saved["step"] == 5
    assert saved["nested"][0]["weights"].tolist() == [5.0, 5.0, 5.0]


def test_the_newest_are_kept(folder: RunFolder) -> None:
    writer = CheckpointWriter(folder, keep=2)
    for step in (1, 2, 3, 4):
        writer.save(step, state(step))
    writer.flush()
    assert kept(folder) == names(3, 4)


@pytest.mark.parametrize(
    ("keep", "steps", "expected"), [(1, (4, 18), (7,)), (2, (4, 16, 18), (4, 7)), (1, (18,), (7,))]
)
def test_damaged_ones_do_not_count_as_the_newest(
    folder: RunFolder, keep: int, steps: tuple[int, ...], expected: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """The run went on from step 4; what it writes then stays, and so does what was damaged, aside."""
    writer = CheckpointWriter(folder, keep=len(steps))
    for step in steps:
        writer.save(step, state(step))
    writer.flush()
    for step in steps[4 in steps :]:
        (folder.checkpoints / names(step)[0] / "state.pt").write_bytes(b"damaged")
    newest = newest_checkpoint(folder.checkpoints) if 4 in steps else None
    assert newest is None or newest[2]["step"] == 4
    resumed = CheckpointWriter(folder, keep)
    resumed.continue_from(4 if 4 in steps else 0)
    resumed.save(7, state(7))
    resumed.flush()
    assert kept(folder) == names(*expected)
    again = newest_checkpoint(folder.checkpoints)
    assert again is not None
    assert again[2]["step"] == 7
    aside = sorted(path.name for path in folder.checkpoints.glob("damaged-*"))
    assert aside == [f"damaged-{name}" for name in names(*steps[4 in steps :])]
    assert f"the damaged checkpoint {names(18)[0]} is now" in caplog.text


@pytest.mark.parametrize("dies_at", [1, 2])
def test_the_one_before_of_the_same_step_is_not_lost(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Killed between the calls that put it aside and the new one in its place."""
    writer, rename = CheckpointWriter(folder, keep=2), os.rename
    writer.save(3, state(3))
    writer.flush()
    renames = 0

    def dies(*paths: Any) -> None:
        nonlocal renames
        renames += 1
        if renames == dies_at:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder.checkpoints, 3, state(30), keep=2)
    monkeypatch.setattr(os, "rename", rename)
    CheckpointWriter(folder, keep=2).continue_from(3)
    assert kept(folder) == names(3)
    assert load_checkpoint(folder.checkpoints / "step-00000003")["step"] == 3
    assert [path.name for path in folder.checkpoints.iterdir()] == names(3)


def test_an_error_comes_with_the_next_step(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **options: Any) -> None:
        raise ZeroDivisionError("of the writer")

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", fails)
    writer = CheckpointWriter(folder, keep=1)
    writer.save(4, state(4))
    with pytest.raises(OSError, match="cannot write the checkpoint of step 4: ZeroDivisionError: of the writer"):
        writer.flush()
    writer.raise_error()  # once


def test_what_is_being_written_is_finished_after_an_error_elsewhere(folder: RunFolder) -> None:
    writer = CheckpointWriter(folder, keep=1)
    writer.save(6, state(6))
    with pytest.raises(KeyError), writer.finished():
        raise KeyError
    assert kept(folder) == names(6)
