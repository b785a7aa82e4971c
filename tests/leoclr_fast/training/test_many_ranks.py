"""Any number of ranks: the same images, and with batch statistics over all of them the same results.

Three gloo ranks run all cases of `rank_program` once, two of them go on; here is what they should have seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import SyncBatchNorm2d
from leoclr_fast.method.methods import METHODS, build_method
from pipelines.augment import draw_augmentation
from pipelines.counter_rng import KEY_SHUFFLE_STREAM, permutation
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.forked_ranks import on_ranks
from tests.leoclr_fast.plain_reference import PlainReference, assert_run_equals
from tests.leoclr_fast.rank_program import (
    NORMS,
    NUM_STEPS,
    PRETRAINED,
    TRAINED,
    batch_norm_example,
    noise_batches,
    pretrained_config,
    trained,
    trained_config,
)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def seen(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks wrote."""
    out = tmp_path_factory.mktemp("ranks")
    on_ranks("tests.leoclr_fast.rank_program", tiny_data, out, log=out / "ranks.log")
    return out


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What a single rank, this process, computes."""
    return {case: trained(trained_config(case), Ranks()) for case in TRAINED}


def of_ranks(seen: Path, case: str, num_ranks: int) -> list[dict[str, Any]]:
    return [torch.load(seen / f"{case}-{rank}.pt") for rank in range(num_ranks)]


def shares(whole: np.ndarray, micro_batches: int, num_ranks: int) -> list[np.ndarray]:
    """What each rank should have of a global batch, by numpy's own way to split."""
    parts = np.array_split(whole, micro_batches)
    return [np.concatenate([np.array_split(part, num_ranks)[rank] for part in parts]) for rank in range(num_ranks)]


@pytest.mark.parametrize("case", PRETRAINED)
def test_three_ranks_equal_the_plain_reference(case: str, seen: Path, tiny_data: Path) -> None:
    """11 images on three ranks, as 4, 4, 3: the loss and the gradient are means over the global batch, each rank has
    its own batch-norm, keys are shuffled between the ranks and enqueued in the order of the images.
    """
    config = pretrained_config(case)
    assert_run_equals(PlainReference(config, num_ranks=3), config, tiny_data, seen / f"run-{case}")


class TestSynchronised:
    """Batch statistics over all ranks: one, two and three of them compute the same, but for the order of sums."""

    @pytest.mark.parametrize("num_ranks", [2, 3])
    @pytest.mark.parametrize("case", TRAINED)
    def test_every_step(self, case: str, num_ranks: int, alone: dict[str, dict[str, Any]], seen: Path) -> None:
        """Losses and gradient norms to 1e-9, and after the last step every tensor: weights, statistics, queue."""
        truth, runs = alone[case], of_ranks(seen, f"{case}-of-{num_ranks}", num_ranks)
        assert len(truth["losses"]) == NUM_STEPS
        assert truth["losses"].unique().numel() == NUM_STEPS
        for run in runs:
            for name in ("losses", "norms"):
                torch.testing.assert_close(run[name], truth[name], rtol=1e-9, atol=0)
            for name, tensor in truth["state"].items():
                size = tensor.abs().max().item()
                torch.testing.assert_close(run["state"][name], tensor, rtol=0, atol=1e-9 * size, msg=name)
        for name, tensor in runs[0]["state"].items():  # the ranks never drift apart
            assert all(torch.equal(run["state"][name], tensor) for run in runs[1:]), name

    @pytest.mark.parametrize("num_ranks", [2, 3])
    @pytest.mark.parametrize("case", TRAINED)
    def test_images_of_each_step(self, case: str, num_ranks: int, alone: dict[str, dict[str, Any]], seen: Path) -> None:
        runs = of_ranks(seen, f"{case}-of-{num_ranks}", num_ranks)
        for step, whole in enumerate(alone[case]["indices"]):
            expected = shares(np.array(whole), trained_config(case).result.micro_batches, num_ranks)
            assert [run["indices"][step] for run in runs] == [share.tolist() for share in expected]
        if num_ranks == 3 and case == "sync-256":
            assert [len(run["indices"][0]) for run in runs] == [86, 85, 85]

    @pytest.mark.parametrize("case", TRAINED)
    def test_buffers_that_stay_where_they_are_change_nothing(self, case: str, seen: Path) -> None:
        """As in a captured graph: every step copies into the same buffers, and the first is run before it counts."""
        for run, static in zip(
            of_ranks(seen, f"{case}-of-3", 3), of_ranks(seen, f"{case}-static-of-3", 3), strict=True
        ):
            assert torch.equal(static["losses"], run["losses"])
            assert torch.equal(static["norms"], run["norms"])
            for name, tensor in run["state"].items():
                assert torch.equal(static["state"][name], tensor), name

    def test_without_synchronisation_they_would_differ(self, alone: dict[str, dict[str, Any]]) -> None:
        """By a thousand times 1e-9 and more: the statistics of groups of the batch are others."""
        changes = {"result__method__key_batchnorm": "split", "result__method__key_batchnorm_group": 85}
        split = trained(trained_config("sync-256", **changes), Ranks(), 2)
        assert abs(split["losses"][1] / alone["sync-256"]["losses"][1] - 1) > 1e-6


def test_a_resumed_run_is_bit_identical_with_many_buckets(seen: Path) -> None:
    """The sum over three ranks depends on its order, and each of 64 gradients is summed by itself."""
    for whole, continued in of_ranks(seen, "resumed", 3):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, continued, strict=True))


@pytest.mark.parametrize("key_passes", ["separate", "joint"])
def test_shuffle_is_the_permutation(key_passes: str, seen: Path) -> None:
    """Which image's key is computed on which rank: the very crops and parameters that the permutation says, in its
    order, for 11 images in two micro-batches on three ranks, at step 8 (none of whose groups has a query's images).
    """
    runs = of_ranks(seen, f"exchange-{key_passes}", 3)
    config = tiny_config(result__batch_size=11, result__views__image_size=4)
    (whole,) = noise_batches(config, Ranks(), 1)
    table = draw_augmentation(METHODS["leoclr"].views, config.result.views, 0, 0, whole.indices).unflatten(0, (3, 11))
    expected: list[list[tuple[int, int]]] = [[], [], []]
    sizes: list[list[int]] = [[], [], []]
    for pass_number, views in enumerate([(1, 2)] if key_passes == "joint" else [(1,), (2,)]):
        keys = [(view, image) for view in views for image in range(11)]
        order = permutation(0, 8, len(keys), KEY_SHUFFLE_STREAM + pass_number)
        for part in np.split(order, [6 * len(views)]):  # the micro-batches have 6 and 5 images
            for rank, own in enumerate(np.array_split(part, 3)):
                expected[rank] += [keys[place] for place in own]
                sizes[rank].append(len(own))
    queries = shares(np.arange(11), 2, 3)
    for run, own, own_sizes, images in zip(runs, expected, sizes, queries, strict=True):
        assert run["sizes"] == own_sizes
        assert run["indices"] == whole.indices[images].tolist()
        assert torch.equal(run["queries"], whole.crops[images, 0])
        assert torch.equal(run["keys"], torch.stack([whole.crops[image, view] for view, image in own]))
        key_table = torch.stack([table[view, image] for view, image in own])
        assert torch.equal(run["table"], torch.cat((table[0, images], key_table)))
    moved = sum(image not in images for own, images in zip(expected, queries, strict=True) for _, image in own)
    assert moved > 8


class TestSyncBatchNorm:
    """Ten images on three ranks, 4, 3 and 3, against torch's batch-norm of all ten in one process."""

    @pytest.mark.parametrize("name", NORMS)
    def test_equals_batch_norm_of_the_whole_batch(self, name: str, seen: Path) -> None:
        dtype, _ = NORMS[name]
        runs = of_ranks(seen, f"norm-{name}", 3)
        ours = {
            key: torch.cat([run[key] for run in runs])
            for key in ("output", "gradient", "key_output", "eval_output")
        } | {key: runs[0][key] for key in ("weight", "bias")}  # fmt: skip
        ours |= dict(zip(("running_mean", "running_var"), runs[0]["statistics"], strict=False))
        truth, peer = whole_batch_norm(dtype, torch.float64), whole_batch_norm(dtype, dtype)
        for key, value in ours.items():
            assert value.dtype == peer[key].dtype, key
            size = truth[key].abs().max().item()
            error = (value.double() - truth[key]).abs().max().item()
            peers_error = (peer[key].double() - truth[key]).abs().max().item()
            tolerance = 1e-12 if dtype == torch.float64 else peers_error / size + 1e-6
            assert error <= tolerance * size, f"{key}: {error:.1e} beside values up to {size:.1e}, torch {peers_error}"
        for run in runs:
            assert run["formats"] == [True, True]
            assert run["statistics"][2] == 1
            assert all(torch.equal(a, b) for a, b in zip(run["statistics"], runs[0]["statistics"], strict=True))
            assert torch.equal(run["key_statistics"][0], torch.zeros(3, dtype=run["key_statistics"][0].dtype))
            assert torch.equal(run["key_statistics"][1], torch.ones(3, dtype=run["key_statistics"][1].dtype))

    def test_gradients_are_those_of_differences(self) -> None:
        norm = SyncBatchNorm2d(torch.nn.BatchNorm2d(2).double(), Ranks())
        images = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weight, bias = torch.tensor([0.7, -1.2]).double(), torch.tensor([0.1, 2.0]).double()

        def output(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (images,))

        inputs = [tensor.requires_grad_() for tensor in (images, weight, bias)]
        assert torch.autograd.gradcheck(output, inputs)

    def test_one_rank_keeps_torchs(self) -> None:
        config = tiny_config(result__method__query_batchnorm="sync").result
        alone = build_method(config)
        assert not any(isinstance(module, SyncBatchNorm2d) for module in alone.query_encoder.modules())
        one_of_two = build_method(config, Ranks(0, 2))
        kinds = {type(module) for module in one_of_two.query_encoder.modules()}
        assert SyncBatchNorm2d in kinds
        assert torch.nn.BatchNorm2d not in kinds
        assert not any(isinstance(module, SyncBatchNorm2d) for module in one_of_two.key_encoder.modules())
        assert one_of_two.state_dict().keys() == alone.state_dict().keys()


def whole_batch_norm(dtype: torch.dtype, computed_in: torch.dtype) -> dict[str, Tensor]:
    """torch's batch-norm of all images, of the values that `dtype` has for them."""
    norm, images, weights = batch_norm_example(dtype)
    if computed_in == torch.float64:
        norm, images, weights = norm.double(), images.double(), weights.double()
    images.requires_grad_()
    key_output = F.batch_norm(images.detach(), None, None, norm.weight, norm.bias, training=True).detach()
    output = norm(images)
    (output * weights).sum().backward()
    assert images.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return {
        "output": output.detach(), "gradient": images.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
        "key_output": key_output, "running_mean": norm.running_mean, "running_var": norm.running_var,
        "eval_output": norm.eval()(images).detach(),
    }  # fmt: skip


def test_what_is_sent(seen: Path) -> None:
    """Gradients, statistics, metrics, keys, and crops with their parameters."""
    method = build_method(tiny_config(result__views__image_size=8).result)
    num_gradients = sum(weight.numel() for weight in method.query_encoder.parameters())
    num_statistics = sum(b.numel() for b in method.query_encoder.buffers() if b.is_floating_point())
    num_steps, metrics_bytes = 3, 3 * 4 * 8
    for run in of_ranks(seen, "metered", 2):
        assert run["bytes"] == {
            "all_reduce": num_steps * 4 * (num_gradients + num_statistics) + metrics_bytes,
            "all_gather": num_steps * 24 * 8 * 4,
            "all_to_all": num_steps * 12 * (8 * 8 * 3 + 13 * 8),
        }
        assert run["calls"] == {"all_reduce": num_steps * 2 + 1, "all_gather": num_steps, "all_to_all": num_steps}
        assert run["seconds"] > 0
