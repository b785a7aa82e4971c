"""What test_augment.py asks of the other implementations, asked of Triton's, at sizes for Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported: test_augment_triton.py runs this file in a process of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as TF

from pipelines import augment_triton as compiled
from pipelines.augment import AugmentParameters, augment
from pipelines.config import ViewConfig
from tests.pipelines.test_augment import (
    KINDS,
    assert_close,
    parameters,
    pictures,
    plain_config,
    random_parameters,
    references,
)
from tests.tolerances import AUGMENT, AUGMENT_TRITON_BESIDE_TORCH


def augmented(
    crops: Tensor, drawn: AugmentParameters, config: ViewConfig, dtype: torch.dtype = torch.float32
) -> Tensor:
    return augment(crops, drawn, config, dtype=dtype, impl="triton")


def assert_equals_torchvision(crops: Tensor, drawn: AugmentParameters, config: ViewConfig) -> None:
    truth, _ = references(crops, drawn, config.blur_kernel_size)
    ours, plain = augmented(crops, drawn, config), augment(crops, drawn, config, impl="torch")
    assert_close(ours, truth, AUGMENT[torch.float32])
    assert (ours - truth).abs().max() <= (plain - truth).abs().max() + AUGMENT_TRITON_BESIDE_TORCH


class TestAgainstTorchvision:
    @pytest.mark.parametrize(
        ("size", "count", "kind"),
        [
            (16, 24, "waves"),
            (33, 24, "noise"),
            (48, 4, "black and white"),
            *(pytest.param(size, 48, kind, marks=pytest.mark.long) for size in (33, 64) for kind in KINDS),
        ],
    )
    def test_the_whole_chain_in_all_orders(self, size: int, count: int, kind: str) -> None:
        drawn = random_parameters(count, blur=np.arange(count) % 4 == 0)
        assert_equals_torchvision(pictures(count, size, kind), drawn, plain_config(size))

    @pytest.mark.parametrize(
        "alone",
        [
            *({"jitter": True, name: [0.6, 0.93, 1.0, 1.4]} for name in ("brightness", "contrast", "saturation")),
            {"jitter": True, "hue": [-0.1, -0.003, 0.05, 0.1]},
            {"jitter": True, "hue": [-0.5, -0.3, 0.3, 0.5]},
            {"grayscale": True},
            {"blur": True, "sigma": [0.1, 0.5, 1.3, 2.0]},
            {"flip": True},
        ],
        ids=lambda alone: "-".join(alone),
    )
    def test_each_operation_alone(self, alone: dict[str, object]) -> None:
        assert_equals_torchvision(pictures(4, 33, "waves"), parameters(4, **alone), plain_config(33))

    def test_the_widest_factors(self) -> None:
        rng = np.random.default_rng(0)
        factors = {name: rng.choice([0.0, 0.3, 2.0], 24) for name in ("brightness", "contrast", "saturation")}
        drawn = random_parameters(24, **factors, hue=rng.choice([-0.5, 0.25, 0.5], 24), blur=False)
        assert_equals_torchvision(pictures(24, 16, "waves"), drawn, plain_config(16))

    def test_another_order_would_be_noticed(self) -> None:
        crops, drawn = pictures(24, 16, "waves"), random_parameters(24, blur=False, grayscale=False, flip=False)
        shifted = AugmentParameters(torch.cat((drawn.table[:, :4], drawn.table.roll(1, 0)[:, 4:]), dim=1))
        truth, _ = references(crops, shifted, 3)
        errors = (augmented(crops, drawn, plain_config(16)) - truth).abs().amax(dim=(1, 2, 3))
        assert (errors > 1e-3).sum() >= 16

    def test_one_colour(self) -> None:
        colours = torch.tensor([(0, 0, 0), (255, 255, 255), (7, 7, 7), (255, 0, 0), (3, 200, 99)], dtype=torch.uint8)
        crops = colours.repeat(5, 1)[:24, None, None].expand(24, 8, 8, 3)
        assert_equals_torchvision(crops, random_parameters(24), plain_config(8))

    @pytest.mark.parametrize("shift", [-1e-20, 0.0, 1e-20, 1 / 6, -0.5, 0.5, 1.0, -3.75])
    def test_any_hue(self, shift: float) -> None:
        levels = torch.tensor([0, 1, 127, 255], dtype=torch.uint8)
        crops = torch.cartesian_prod(levels, levels, levels).reshape(1, 8, 8, 3)
        config, drawn = plain_config(8, blur_probability=0.0), parameters(1, jitter=True, hue=shift)
        truth = augment(crops, drawn, config, dtype=torch.float64)
        assert (augmented(crops, drawn, config) - truth).abs().max() <= AUGMENT[torch.float32].max

    @pytest.mark.parametrize("sigma", [1e-6, 0.1, 0.15, 2.0, 1e3])
    @pytest.mark.parametrize("size", [2, 16, pytest.param(50, marks=pytest.mark.long)])
    def test_any_sigma(self, size: int, sigma: float) -> None:
        """At 2 pixels, every tap of a border is a reflected one."""
        crops, drawn, config = pictures(2, size), parameters(2, blur=True, sigma=sigma), plain_config(size)
        truth, ours = augment(crops, drawn, config, dtype=torch.float64), augmented(crops, drawn, config)
        assert (ours - truth).abs().max() <= AUGMENT[torch.float32].max
        if sigma == 1e-6:
            assert torch.equal(ours, augmented(crops, parameters(2), config))

    def test_a_blur_that_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="a blur of 3 taps does not fit images of 1 pixels"):
            augmented(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), parameters(1), ViewConfig(image_size=1))


class TestExactly:
    def test_a_sample_without_augmentation_is_only_normalised(self) -> None:
        config, crops = ViewConfig(image_size=33), pictures(6, 33)
        drawn = random_parameters(6, jitter=[0, 1] * 3, blur=[0, 1] * 3, grayscale=[0, 1] * 3, flip=[0, 1] * 3)
        ours = augmented(crops, drawn, config)
        plain = TF.normalize(crops.permute(0, 3, 1, 2) / 255, config.mean, config.std)
        assert torch.equal(ours[::2], plain[::2])
        assert not torch.isclose(ours[1::2], plain[1::2]).all(dim=(1, 2, 3)).any()

    def test_flip(self) -> None:
        config, crops = ViewConfig(image_size=33), pictures(3, 33)
        flipped = augmented(crops, parameters(3, flip=[True, False, True]), config)
        assert torch.equal(flipped[::2], augmented(crops.flip(2), parameters(3), config)[::2])
        assert torch.equal(flipped[1], augmented(crops, parameters(3), config)[1])

    def test_grayscale_has_three_equal_channels(self) -> None:
        ours = augmented(pictures(2, 32), parameters(2, grayscale=True, blur=[True, False]), plain_config(32))
        assert torch.equal(ours[:, 0], ours[:, 1])
        assert torch.equal(ours[:, 0], ours[:, 2])

    @pytest.mark.parametrize("value", [0, 255])
    def test_black_and_white_stay_in_range(self, value: int) -> None:
        crops = torch.full((12, 8, 8, 3), value, dtype=torch.uint8)
        ours = augmented(crops, random_parameters(12), plain_config(8))
        assert ours.min() >= 0
        assert ours.max() <= 1 + AUGMENT[torch.float32].max
        if value == 0:
            assert (ours == 0).all()

    @pytest.mark.parametrize("name", ["jitter", "grayscale", "blur", "flip"])
    def test_probability_zero_leaves_the_operation_out(self, name: str) -> None:
        crops, drawn = pictures(6, 16), random_parameters(6, **{name: True})
        without = augmented(crops, drawn, plain_config(16, **{f"{name}_probability": 0.0}))
        assert torch.equal(without, augmented(crops, random_parameters(6, **{name: False}), plain_config(16)))

    def test_normalisation_comes_last(self) -> None:
        config, crops, drawn = ViewConfig(image_size=16), pictures(6, 16), random_parameters(6)
        plain = augmented(crops, drawn, plain_config(16))
        assert torch.equal(augmented(crops, drawn, config), TF.normalize(plain, config.mean, config.std))


class TestForm:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("count", "size"), [(3, 32), (0, 32), (1, 33)])
    def test_shape_dtype_and_layout(self, count: int, size: int, dtype: torch.dtype) -> None:
        crops = torch.zeros(count, size, size, 3, dtype=torch.uint8)
        ours = augmented(crops, random_parameters(count), ViewConfig(image_size=size), dtype)
        assert ours.shape == (count, 3, size, size)
        assert ours.dtype == dtype
        assert count == 0 or ours.stride() == (3 * size**2, 1, 3 * size, 3)

    @pytest.mark.parametrize(("dtype", "units"), [(torch.float16, 0), (torch.bfloat16, 1)])
    def test_half_precision_is_float32_rounded_once(self, dtype: torch.dtype, units: int) -> None:
        """The interpreter cuts bfloat16 off where a GPU rounds it."""
        crops, drawn, config = pictures(6, 16), random_parameters(6), ViewConfig(image_size=16)
        ours, expected = augmented(crops, drawn, config, dtype), augmented(crops, drawn, config).to(dtype)
        assert (ours.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max() <= units

    def test_crops_and_parameters_are_left_alone(self) -> None:
        crops, drawn = pictures(6, 16), random_parameters(6)
        kept, table = crops.clone(), drawn.table.clone()
        augmented(crops, drawn, ViewConfig(image_size=16))
        assert torch.equal(crops, kept)
        assert torch.equal(drawn.table, table)

    def test_crops_of_any_strides(self) -> None:
        crops, config = pictures(6, 17), ViewConfig(image_size=17)
        drawn = random_parameters(6, jitter=False, blur=[True, *[False] * 5])

        def same(strided: Tensor, plain: Tensor) -> bool:
            table = AugmentParameters(drawn.table[: len(plain)])
            return torch.equal(augmented(strided, table, config), augmented(plain, table, config))

        views = crops.unflatten(0, (2, 3)).transpose(0, 1)
        assert same(views, views.flatten(0, 1))
        assert same(crops[1::2], crops[1::2].clone())
        assert same(crops[:, None, None], crops)
        assert same(crops[3:4].expand(3, -1, -1, -1), crops[3:4].repeat(3, 1, 1, 1))
        assert same(crops.transpose(1, 2), crops.transpose(1, 2).contiguous())
        assert same(pictures(3, 24)[:, 5:22, 2:19], pictures(3, 24)[:, 5:22, 2:19].clone())

    def test_any_number_of_views_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        crops, drawn, config = pictures(19, 16), random_parameters(19, grayscale=False), plain_config(16)
        expected = augmented(crops, drawn, config)
        monkeypatch.setattr(compiled, "_PLANE_ELEMENTS", 1)  # 16 views
        assert torch.equal(augmented(crops, drawn, config), expected)

    def test_a_view_depends_on_itself_alone(self) -> None:
        crops, drawn, config = pictures(6, 33), random_parameters(6), ViewConfig(image_size=33)
        together = augmented(crops, drawn, config)
        for first, stop in ((0, 1), (1, 6)):
            part = AugmentParameters(drawn.table[first:stop])
            assert torch.equal(augmented(crops[first:stop], part, config), together[first:stop])

    def test_what_it_cannot_take(self) -> None:
        crops, drawn, config = pictures(2, 32), parameters(2), ViewConfig(image_size=32)
        with pytest.raises(ValueError, match="computes in float32, not float64; choose impl auto or torch"):
            augmented(crops, drawn, config, torch.float64)
        with pytest.raises(ValueError, match=r"squares of uint8 RGB, and these are torch.float32 \[2, 32, 32, 3\]"):
            augmented(crops.float(), drawn, config)
        with pytest.raises(ValueError, match=r"the crops are on cpu, the parameters on meta, and it needs one CUDA"):
            augmented(crops, drawn.to(torch.device("meta")), config)
