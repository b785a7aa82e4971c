"""Backbone, moving average and the key encoder's batch-norm."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from leoclr_fast.config import BackboneConfig, MethodConfig, ResultConfig
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.backbone import Encoder, build_backbone
from leoclr_fast.method.key_batchnorm import KeyBatchNorm2d, convert_key_batchnorm
from leoclr_fast.method.methods import build_method
from leoclr_fast.method.momentum_contrast import MomentumContrast, update_key_encoder
from leoclr_fast.method.split_batchnorm import SplitBatchNorm2d

TINY = BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.0625)


def test_initialisation_is_torchvisions() -> None:
    """Kaiming fan-out for every convolution, ones and zeros for batch-norm: also in a rebuilt narrow network."""
    for config in (
        BackboneConfig(arch="resnet18"),
        BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.5),
    ):
        torch.manual_seed(1)
        for name, module in build_backbone(config).named_modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                expected = (2 / fan_out) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
            elif isinstance(module, nn.BatchNorm2d):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert torch.equal(module.bias, torch.zeros_like(module.bias))


def test_small_stem_and_width() -> None:
    backbone = build_backbone(BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.25))
    assert backbone.conv1.weight.shape == (16, 3, 3, 3)
    assert isinstance(backbone.maxpool, nn.Identity)
    assert backbone.layer4[1].conv2.weight.shape == (128, 128, 3, 3)
    assert backbone.feature_dim == 128
    activations = {}
    backbone.layer1.register_forward_hook(lambda *args: activations.update(layer1=args[2].shape))
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert activations["layer1"] == (2, 16, 32, 32)  # the full resolution reaches the first stage
    wide = build_backbone(BackboneConfig(arch="resnet50", width_multiplier=2.0))
    assert wide.feature_dim == 4096
    assert wide.layer1[0].conv2.weight.shape == (128, 128, 3, 3)


@pytest.mark.parametrize(("layers", "expected"), [(2, [(32, 32), (8, 32)]), (1, [(8, 32)])])
def test_encoder_gives_unit_vectors_through_its_head(layers: int, expected: list[tuple[int, int]]) -> None:
    encoder = Encoder(TINY, 8, layers)
    shapes = [tuple(module.weight.shape) for module in encoder.projection_head if isinstance(module, nn.Linear)]
    assert shapes == expected
    torch.testing.assert_close(encoder(torch.randn(5, 3, 16, 16)).norm(dim=1), torch.ones(5))


def test_moving_average_is_exact_and_in_place() -> None:
    torch.manual_seed(0)
    query, key = Encoder(TINY, 8).double(), Encoder(TINY, 8).double()
    before = {name: weight.clone() for name, weight in key.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in key.named_buffers()}
    addresses = [weight.data_ptr() for weight in key.parameters()]
    query(torch.randn(4, 3, 16, 16, dtype=torch.float64))  # moves the query's running statistics
    update_key_encoder(key, query, 0.99)
    for (name, weight), source in zip(key.named_parameters(), query.parameters(), strict=True):
        torch.testing.assert_close(weight, 0.99 * before[name] + 0.01 * source, rtol=1e-14, atol=1e-16)
    assert [weight.data_ptr() for weight in key.parameters()] == addresses
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in key.named_buffers())
    update_key_encoder(key, query, 0.99, include_buffers=True)
    mean, query_mean = key.backbone.bn1.running_mean, query.backbone.bn1.running_mean
    torch.testing.assert_close(mean, 0.01 * query_mean, rtol=1e-13, atol=1e-16)


def random_batchnorm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def key_batchnorm(mode: str, group: int = 4) -> KeyBatchNorm2d:
    module = nn.Sequential(random_batchnorm())
    config = MethodConfig(key_batchnorm=mode, key_batchnorm_group=group)  # type: ignore[arg-type]
    convert_key_batchnorm(module, config, Ranks())
    assert isinstance(module[0], KeyBatchNorm2d)
    return module[0]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    ("num_images", "expected_groups"), [(12, [4, 4, 4]), (13, [5, 4, 4]), (3, [3]), (7, [7]), (8, [4, 4])]
)
def test_split_batchnorm_normalises_groups(
    num_images: int, expected_groups: list[int], compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and queries as by a batch-norm for each group; the query's gradients, too, and its running statistics are
    the mean of the groups'."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # the way that torch.compile takes
    torch.manual_seed(0)
    module, images = key_batchnorm("split"), torch.randn(num_images, 3, 5, 5, dtype=torch.float64)
    alone = [random_batchnorm() for _ in expected_groups]
    for norm in alone:
        norm.load_state_dict(module.state_dict())
    query = SplitBatchNorm2d(alone[0], 4)

    def of_groups(images: torch.Tensor) -> torch.Tensor:
        groups = images.split(expected_groups)
        return torch.cat([norm(group) for norm, group in zip(alone, groups, strict=True)])

    expected = of_groups(images)
    torch.testing.assert_close(module(images), expected, rtol=1e-12, atol=1e-13)
    weights = torch.randn_like(images)
    inputs = [images.clone().requires_grad_(), images.clone().requires_grad_()]
    for norm in alone:
        norm.reset_running_stats()
    for function, given in zip((query, of_groups), inputs, strict=True):
        (function(given) * weights).sum().backward()
    torch.testing.assert_close(query(images.clone()), expected, rtol=1e-12, atol=1e-13)
    of_groups(images)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-12)
    for name in ("weight", "bias"):
        gradients = [getattr(norm, name).grad for norm in alone]
        torch.testing.assert_close(getattr(query, name).grad, torch.stack(gradients).sum(0), rtol=1e-10, atol=1e-12)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in alone]).mean(0)
        torch.testing.assert_close(getattr(query, name), mean, rtol=1e-12, atol=1e-14)
    assert query.num_batches_tracked == 0  # `MomentumContrast.count_batches`
    for norm in (query, *alone):
        norm.eval()
    alone[0].load_state_dict(query.state_dict())
    torch.testing.assert_close(query(images), alone[0](images))


def test_plain_shuffle_and_ema_batchnorm() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    plain = key_batchnorm("plain")
    reference = nn.BatchNorm2d(3).double()
    reference.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(images), reference(images))
    assert key_batchnorm("shuffle").mode == "split"

    averaged = key_batchnorm("ema")
    averaged.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    averaged.running_var.copy_(torch.tensor([4.0, 9.0, 16.0]))
    reference.load_state_dict(averaged.state_dict())
    torch.testing.assert_close(averaged(images), reference.eval()(images))
    assert torch.equal(averaged.running_mean, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


def tiny_method(seed: int = 0, queue_size: int = 64, **changes: Any) -> MomentumContrast:
    config = MethodConfig(queue_size=queue_size, **changes)
    method = build_method(ResultConfig(backbone=TINY, method=config, seed=seed, batch_size=12))
    assert isinstance(method, MomentumContrast)
    return method


def keys_of(method: MomentumContrast, views: list[torch.Tensor], step: int) -> list[torch.Tensor]:
    """The keys of a step on one rank, whose passes see the views in the order of the schedule."""
    schedule = method.plan(BatchLayout(batch_size=len(views[0])))
    order = schedule.draw(0, step)
    passes = torch.cat(views)[torch.from_numpy(order.encoded[0])].split(schedule.pass_sizes)
    return method.encode_keys(passes, torch.from_numpy(order.restore), schedule.largest)


def test_keys_do_not_depend_on_their_place_in_the_batch_but_on_their_group() -> None:
    """Shuffling is undone: key i is image i's; and another step groups the images differently."""
    method = tiny_method(queue_size=64, projection_dim=8, key_batchnorm_group=4).double()
    views = [
        torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    ]
    first, again = (keys_of(method, views, 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = keys_of(method, views, 6)
    assert not torch.allclose(first[0], other[0])
    method = tiny_method(queue_size=64, projection_dim=8, key_batchnorm="ema").double()
    keys = keys_of(method, views, 0)
    alone = [method.key_encoder(image[None]) for image in views[0]]  # no batch statistics: images are independent
    torch.testing.assert_close(keys[0], torch.cat(alone), rtol=1e-12, atol=1e-14)


def test_key_encoder_starts_as_the_query_encoder_and_gets_no_gradient() -> None:
    method = tiny_method(seed=3)
    pairs = zip(method.query_encoder.parameters(), method.key_encoder.parameters(), strict=True)
    assert all(torch.equal(query, key) and not key.requires_grad for query, key in pairs)
    assert torch.equal(tiny_method(seed=3).queue.keys, method.queue.keys)
    assert not torch.equal(tiny_method(seed=4).queue.keys, method.queue.keys)
    assert deepcopy(method.key_encoder.state_dict()).keys() == method.query_encoder.state_dict().keys()
