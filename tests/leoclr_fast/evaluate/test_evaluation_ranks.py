"""Evaluations on two ranks, on one CPU with gloo: what one rank computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from leoclr_fast.distributed.collectives import Ranks
from tests.leoclr_fast.evaluated import kept_results, same_files
from tests.leoclr_fast.evaluation_rank_program import detection, fine_tuned, neighbours
from tests.leoclr_fast.forked_ranks import on_ranks
from tests.leoclr_fast.voc_files import write_voc

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc") / "VOCdevkit", num_train=12, num_test=5)


@pytest.fixture(scope="module")
def seen(tiny_data: Path, voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks computed."""
    out = tmp_path_factory.mktemp("ranks")
    on_ranks("tests.leoclr_fast.evaluation_rank_program", tiny_data, voc, out, log=out / "ranks.log")
    return out


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have: several threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_ranks(seen: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(seen / f"{rank}.pt")[case] for rank in range(2)]


def test_fine_tuning_on_two_ranks_is_that_on_one(seen: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With frozen batch-norm: losses weighted by 5 and 4 of 9 images, gradients summed, statistics averaged."""
    alone = fine_tuned(tiny_data, tmp_path, Ranks())
    for network in of_ranks(seen, "fine-tuned"):
        torch.testing.assert_close(network, alone, rtol=1e-9, atol=1e-11)
    assert alone["fc.weight"].abs().max() > 0.02  # five deviations of its first values


def test_knn_on_two_ranks_is_that_on_one(seen: Path, tiny_data: Path) -> None:
    alone = neighbours(tiny_data, Ranks())
    assert 0 < alone["top1"] < alone["top5"]
    for found in of_ranks(seen, "neighbours"):
        assert (found["top1"], found["top5"]) == (alone["top1"], alone["top5"])
        assert torch.equal(found["labels"], alone["labels"])
        torch.testing.assert_close(found["features"], alone["features"], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_a_detector_on_two_ranks_is_that_on_one(seen: Path, voc: Path, tmp_path: Path) -> None:
    """With frozen batch-norm and nothing sampled at random: losses weighted by 3 and 2 of 5 images, gradients summed;
    the same detector finds the same boxes in the images that the ranks share.
    """
    alone = detection(voc, tmp_path, Ranks())
    assert [len(boxes) > 0 for boxes in alone["boxes"]] == [True] * 5
    assert alone["precisions"]["AP50_11point"] > 0
    seen_by_ranks = of_ranks(seen, "detector")
    assert seen_by_ranks[0]["precisions"] == alone["precisions"]
    for found in seen_by_ranks:
        assert found["labels"] == alone["labels"]
        torch.testing.assert_close(found["scores"], alone["scores"], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(found["boxes"], alone["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["state"], alone["state"], rtol=1e-9, atol=1e-12)
    moved = [name for name, tensor in alone["start"].items() if not torch.equal(tensor, alone["state"][name])]
    assert {"c4.conv1.weight", "rpn.head.bbox_pred.weight", "regions.box_predictor.bbox_pred.bias"} <= set(moved)


def evaluated_on_two_ranks(*arguments: object) -> dict[str, Any]:
    """The JSON of a command under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "leoclr_fast", *map(str, arguments), "--device=cpu", "--json"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "another rank than the first has spoken"
    document: dict[str, Any] = json.loads(lines[0])
    return document


@pytest.mark.long
def test_fine_tuning_on_two_ranks(tiny_data: Path, tiny_run: Path) -> None:
    """Each rank has its own batch-norm, so it is another training than one rank's; but it repeats itself, paused in
    the middle of an epoch, too.
    """
    arguments = ["finetune", tiny_run, "--data", tiny_data, "--percent", 100, "--epochs=3", "--batch-size=9"]
    arguments += ["--base-lr-grid", 0.1, 1]
    (first,) = evaluated_on_two_ranks(*arguments, "--out", tiny_run.parent / "first")["evaluations"]
    (paused,) = evaluated_on_two_ranks(*arguments, "--out", tiny_run.parent / "again", "--max-steps=18")["evaluations"]
    assert (paused["complete"], paused["step"], paused["training"]) == (False, 18, "trial-002")
    (again,) = evaluated_on_two_ranks(*arguments, "--out", tiny_run.parent / "again")["evaluations"]
    assert again == first
    assert first["world_size"] == 2
    assert same_files("network.safetensors", tiny_run.parent / "first", tiny_run.parent / "again")
    assert len(kept_results(tiny_run)) >= 2
