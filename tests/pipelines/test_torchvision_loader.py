"""What is particular to worker processes; see test_loader.py for what every loader has to do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from itertools import chain, count, islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dataset_tools.sources import Split
from pipelines.decode import decode_rgb
from pipelines.torchvision_loader import TorchvisionLoader, require_room_for_workers
from tests.pipelines.oracle import in_order, open_by_name
from tests.tolerances import CROP_RESIZE

BILINEAR = InterpolationMode.BILINEAR


def workers_beside(others: set[BaseProcess]) -> set[int]:
    """Their process ids; others: children of this process that earlier tests may have left, and that may end now."""
    return {process.pid or 0 for process in set(multiprocessing.active_children()) - others}


@pytest.mark.parametrize("image_size", [16, 40])
def test_crops_are_torchvision_s(split: Split, image_size: int) -> None:
    """Exactly so up to Pillow 12; from 13 on its order of the two passes depends on the box."""
    differences = []
    for batch in open_by_name("torchvision", split, workers=0, image_size=image_size).batches(0):
        for row, index in enumerate(batch.indices):
            image = decode_rgb(split, int(index))
            for crop, box in zip(batch.crops[row].numpy(), batch.boxes[row].tolist(), strict=True):
                theirs = TF.resized_crop(image, *box[:4], [image_size, image_size], BILINEAR)
                differences.append(np.abs(crop.astype(int) - np.asarray(theirs).astype(int)))
    if int(PIL.__version__.split(".")[0]) < 13:
        assert np.max(differences) == 0
    assert np.max(differences) <= CROP_RESIZE.max
    assert np.mean(differences) <= CROP_RESIZE.mean


def test_workers_without_room_are_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_room_for_workers(1 << 20, tmp_path)
    with pytest.raises(
        ValueError, match=r"MiB free, and they prepare up to 1,099,511,627,776 MiB: make it larger \(docker"
    ):
        require_room_for_workers(1 << 60, tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 75)
    with pytest.raises(
        ValueError, match="a name of 76 bytes, too long for the sockets of worker processes: set TMPDIR"
    ):
        require_room_for_workers(1, tmp_path)


def test_workers_live_on_between_epochs(split: Split) -> None:
    others = set(multiprocessing.active_children())
    with open_by_name("torchvision", split, workers=2) as loader:
        list(loader.batches(0))
        workers = workers_beside(others)
        assert len(workers) == 2
        list(loader.batches(1))
        assert workers_beside(others) == workers


def test_by_default_one_worker_for_each_core(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    loader = open_by_name("torchvision", split)
    assert isinstance(loader, TorchvisionLoader)
    assert loader._loader.num_workers == 3


def test_labels_stay_on_the_host(split: Split) -> None:
    (batch,) = open_by_name("torchvision", split, in_order(split, 23), device="meta", workers=0).batches(0)
    assert batch.crops.device.type == "meta"
    assert batch.labels.device.type == "cpu"
    assert batch.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 7


def test_a_worker_that_was_killed(split: Split) -> None:
    others = set(multiprocessing.active_children())
    began = 0.0
    # torch's handler of SIGCHLD may raise as soon as the first one is dead, and again for the second while it is left
    expected = r"worker.*(killed by signal|exited unexpectedly|has died)"
    with pytest.raises(RuntimeError, match=expected), open_by_name("torchvision", split, workers=2) as loader:  # noqa: PT012
        batches = islice(chain.from_iterable(map(loader.batches, count())), 1000)
        next(batches)
        workers, began = workers_beside(others), time.monotonic()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        list(batches)
    assert time.monotonic() - began < 60


def test_signals_to_the_group_of_the_run_leave_its_workers_alone(split: Split) -> None:
    """torchrun sends SIGTERM to a rank's whole group of processes; the rank still has a checkpoint to write."""
    others = set(multiprocessing.active_children())
    with open_by_name("torchvision", split, workers=2) as loader:
        expected = [batch.indices.tolist() for batch in loader.batches(0)]
        batches = loader.batches(0)
        seen = [next(batches).indices.tolist()]
        workers = workers_beside(others)
        assert len(workers) == 2
        assert os.getpgid(0) not in [os.getpgid(worker) for worker in workers]
        for worker in workers:
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGUSR1)
        assert seen + [batch.indices.tolist() for batch in batches] == expected
        assert workers_beside(others) == workers
        loader.close()
        assert workers_beside(others) == set()


def test_a_worker_that_hangs(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "read", lambda _: time.sleep(60))
    began = time.monotonic()
    loader = open_by_name("torchvision", split, workers=1, stall_timeout_s=1.0)
    with loader, pytest.raises(RuntimeError, match="timed out"):
        list(loader.batches(0))
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("workers", [0, 2])
def test_copying_ahead_keeps_the_order(workers: int, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for a GPU, without one."""
    with open_by_name("torchvision", split, workers=workers) as loader:
        expected = list(loader.batches(2))
        monkeypatch.setattr(TorchvisionLoader, "_is_copied_ahead", True)
        for start in range(5):
            batches = list(loader.batches(2, start))
            assert [batch.step for batch in batches] == list(range(start, 4))
            for batch, other in zip(batches, expected[start:], strict=True):
                assert torch.equal(batch.crops, other.crops)
                assert np.array_equal(batch.indices, other.indices)
