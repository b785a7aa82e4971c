"""What one of a node's ranks makes for all of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.sources import Split
from pipelines.node_memory import made_once
from pipelines.resident_loader import load_resident_images
from tests.pipelines.oracle import CPU


@pytest.fixture(autouse=True)
def _two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def answers(ask: Callable[[], Any], count: int = 2) -> list[Any]:
    """What some processes get that ask at a time; each lives until all have."""

    def run(connection: Connection) -> None:
        connection.send(ask())
        connection.recv()

    pipes = [get_context("fork").Pipe() for _ in range(count)]
    processes = [get_context("fork").Process(target=run, args=(theirs,)) for _, theirs in pipes]
    for process in processes:
        process.start()
    found = [ours.recv() for ours, _ in pipes]
    for (ours, _), process in zip(pipes, processes, strict=True):
        ours.send("end")
        process.join(20)
        assert process.exitcode == 0
    return found


def test_one_makes_it_and_all_have_it() -> None:
    def ask() -> Any:
        made = {"a": np.arange(7), "empty": np.empty(0, dtype=np.uint8), "b": np.full((3, 5), os.getpid())}
        arrays, is_ours = made_once("key", lambda: made)
        arrays["a"][0] += 1  # it may be written to, as compiled code asks for
        return is_ours, arrays["a"][1:].tolist(), arrays["empty"].size, arrays["b"].tolist()

    first, *others = sorted(answers(ask, 4), reverse=True)
    assert first[0] is True
    assert [other[0] for other in others] == [False] * 3
    assert {str(answer[1:]) for answer in (first, *others)} == {str(first[1:])}


def test_a_rank_that_fails_leaves_it_to_the_next(tmp_path: Path) -> None:
    def fail() -> Any:
        raise ValueError("no image can be read")

    with pytest.raises(ValueError, match="no image"):
        made_once("key", fail)
    assert [is_ours for _, is_ours in (made_once("key", lambda: {"a": np.ones(2)}) for _ in range(2))] == [True, False]


@pytest.mark.parametrize("note", ["", "damaged", '{"process": 1, "file": 0, "arrays": []}', "[]"])
def test_what_a_process_that_is_gone_has_left(note: str, tmp_path: Path) -> None:
    (tmp_path / f"leoclr-{os.getuid()}-{os.getppid()}-key").write_text(note)
    arrays, is_ours = made_once("key", lambda: {"a": np.arange(3)})
    assert (arrays["a"].tolist(), is_ours) == ([0, 1, 2], True)


def test_a_rank_that_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert made_once("key", dict) == ({}, True)
    assert list(tmp_path.iterdir()) == []


def test_each_image_is_decoded_by_one_rank(split: Split, damage: Callable[..., None]) -> None:
    damage(split, 5)

    def ask() -> Any:
        resident = load_resident_images(split, CPU, 1)
        return (
            resident.num_decodes,
            resident.unreadable,
            resident.source_index[5],
            int(resident.images.pixels.numpy().sum()),
        )

    ours, theirs = sorted(answers(ask), key=lambda answer: -answer[0])
    assert (ours[0], theirs[0]) == (22, 0)
    assert ours[1:] == theirs[1:]
    assert list(ours[1]) == [5]
    assert ours[2] == 6
