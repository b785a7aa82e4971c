"""Augmentation against torchvision's functions, against the published PIL path, and in distribution.

The truth is torchvision in float64, but for the hue: there torchvision falls back to float32, so that it is written
out here, and held against torchvision and colorsys.

Triton reads TRITON_INTERPRET when it is imported: its kernels meet `TestEachImplementation` in a process of its own, at
sizes for its interpreter (`test_triton_interpreter`).
"""

from __future__ import annotations

import colorsys
import math
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import ColorJitter, GaussianBlur
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as V2

try:
    from scipy import stats
except ImportError:  # tests/gpu takes pictures from here, on machines that may lack it
    stats = None

from pipelines import augment as module
from pipelines import augment_numba as compiled
from pipelines import kernels
from pipelines.augment import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    JITTER,
    ORDER,
    SATURATION,
    SIGMA,
    adjust_hue,
    augment,
    augmented_views,
    blur_weights,
    draw_augmentation,
)
from pipelines.augment_numba import augment_numba
from pipelines.batch import CropBatch
from pipelines.config import ViewConfig
from pipelines.kernels import Impl
from pipelines.views import CENTER_CROP_VIEWS, LEOCLR_VIEWS, LINEAR_TRAIN_VIEWS, MOCOV2_VIEWS, ViewRecipe
from tests.pipelines.pictures import picture
from tests.tolerances import (
    AUGMENT,
    AUGMENT_BESIDE_TORCHVISION,
    AUGMENT_NUMBA_BESIDE_TORCH,
    AUGMENT_TRITON_BESIDE_TORCH,
    COLORSYS,
    PIL_BLUR,
    PIL_CHAIN,
    TORCHVISION_HUE,
    Tolerance,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ORDERS = module._JITTER_ORDERS
TORCH: tuple[torch.dtype, Impl] = (torch.float32, "torch")
IMPLEMENTATIONS: list[tuple[torch.dtype, Impl]] = (
    [(torch.float32, "triton")] if INTERPRETED else [(torch.float64, "torch"), TORCH, (torch.float32, "numba")]
)
BESIDE_TORCH = {"torch": 0.0, "numba": AUGMENT_NUMBA_BESIDE_TORCH, "triton": AUGMENT_TRITON_BESIDE_TORCH}
SIDE, COUNT = (16, 6) if INTERPRETED else (32, 24)
KINDS = ("noise", "black and white", "gray", "waves")
COLOURS = [(0, 0, 0), (255, 255, 255), (7, 7, 7), (255, 0, 0), (3, 200, 99)]
NOTHING = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
each = pytest.mark.parametrize(("dtype", "impl"), IMPLEMENTATIONS)
each_impl = pytest.mark.parametrize("impl", sorted({impl for _, impl in IMPLEMENTATIONS}))


def pictures(count: int, size: int, kind: str = "noise") -> Tensor:
    """uint8 [count, S, S, 3]"""
    return torch.from_numpy(np.stack([picture(size, size, kind, seed) for seed in range(count)]))


def plain_config(size: int, **changes: object) -> ViewConfig:
    """Leaves the values in [0, 1]."""
    return replace(ViewConfig(image_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), **changes)


def parameters(count: int, **given: object) -> Tensor:
    """What is not given does nothing."""
    order = np.broadcast_to(given.pop("order", np.arange(4)), (count, 4))
    flags = dict.fromkeys(("jitter", "grayscale", "blur", "flip"), False)
    factors, others = (
        np.column_stack([np.broadcast_to(given.pop(name, value), count) for name, value in values.items()])
        for values in (NOTHING, flags | {"sigma": 1.0})
    )
    assert not given
    return torch.from_numpy(np.concatenate((factors, order, others), axis=1).astype(float))


def random_parameters(count: int, seed: int = 0, **given: object) -> Tensor:
    """Jitter always, in each of the 24 orders; the rest as MoCo-v2 has it."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.uniform(0.6, 1.4, count) for name in ("brightness", "contrast", "saturation")}
    drawn |= {"hue": rng.uniform(-0.1, 0.1, count), "order": ORDERS[np.arange(count) % 24], "jitter": True}
    drawn |= {"grayscale": rng.random(count) < 0.2, "blur": rng.random(count) < 0.5, "flip": rng.random(count) < 0.5}
    return parameters(count, **(drawn | {"sigma": rng.uniform(0.1, 2.0, count)} | given))


def exact_hue(image: Tensor, shift: float) -> Tensor:
    """RGB -> HSV -> RGB as torchvision does it, in float64. image: [3, S, S]."""
    red, green, blue = image.double().numpy()
    value, lowest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = value - lowest
    rc, gc, bc = ((value - channel) / np.where(chroma == 0, 1, chroma) for channel in (red, green, blue))
    hue = np.where(value == red, bc - gc, np.where(value == green, 2 + rc - bc, 4 + gc - rc)) / 6
    saturation = chroma / np.where(value == 0, 1, value)
    sector = (np.where(chroma == 0, 0, hue) + shift) % 1 * 6
    whole = np.floor(sector)
    part = sector - whole
    p, q, t = (value * (1 - saturation * x) for x in (1, part, 1 - part))
    case = whole.astype(int) % 6
    channels = [(value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q)]
    return torch.from_numpy(np.stack([np.choose(case, choices) for choices in channels]))


def three_boxes(sigma: float) -> np.ndarray:
    """Weights of Pillow's blur: three boxes, whose ends count in part, of variance sigma squared / 3 each."""
    shortest, longest = 0.0, 3.0 * sigma + 1.0
    for _ in range(200):
        radius = (shortest + longest) / 2
        distance = np.arange(-math.ceil(radius) - 1, math.ceil(radius) + 2)
        box = np.clip(radius + 1 - abs(distance), 0, 1) / (2 * radius + 1)
        too_long = (box * distance**2).sum() > sigma**2 / 3
        shortest, longest = (shortest, radius) if too_long else (radius, longest)
    return np.convolve(np.convolve(box, box), box)


def plain_blur(image: Tensor, sigma: float) -> Tensor:
    """A blur with repeated borders, in the dtype of the image [3, S, S]."""
    kernel = torch.from_numpy(three_boxes(sigma)).to(image.dtype)
    reach = len(kernel) // 2
    padded = torch.nn.functional.pad(image[:, None], [reach] * 4, mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel[None, None, None])
    return torch.nn.functional.conv2d(rows, kernel[None, None, :, None])[:, 0]


def torchvision_chain(image: Tensor, row: Tensor, *, exact: bool) -> Tensor:
    """MoCo-v2's chain up to the flip for one image, float [3, S, S] in [0, 1], with the parameters of one row."""
    factors, order = row[:4].tolist(), row[4:8].long().tolist()
    jitter, grayscale, blur, flip, sigma = row[8:].tolist()
    functions = (V2.adjust_brightness, V2.adjust_contrast, V2.adjust_saturation, exact_hue if exact else V2.adjust_hue)
    for operation in order if jitter else ():
        image = functions[operation](image, factors[operation])
    if grayscale:
        image = V2.rgb_to_grayscale(image, num_output_channels=3)
    if blur:
        image = plain_blur(image, sigma)
    if flip:
        image = V2.horizontal_flip(image)
    return image


def references(crops: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The truth in float64, and torchvision in float32."""
    images = crops.permute(0, 3, 1, 2)
    rows = list(zip(images, drawn, strict=True))
    truth = [torchvision_chain(image.double() / 255, row, exact=True) for image, row in rows]
    single = [torchvision_chain(image.float() / 255, row, exact=False) for image, row in rows]
    return torch.stack(truth), torch.stack(single)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: Tolerance) -> None:
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs()
    assert difference.max().item() <= tolerance.max
    assert difference.mean().item() <= tolerance.mean


def assert_equals_torchvision(crops: Tensor, drawn: Tensor, config: ViewConfig) -> None:
    """By every implementation; by those in float32 as closely as by torchvision's own in float32."""
    truth, single = references(crops, drawn)
    errors = {}
    for dtype, impl in {*IMPLEMENTATIONS, TORCH}:
        ours = augment(crops, drawn, config, dtype=dtype, impl=impl)
        assert ours.dtype == dtype
        assert_close(ours, truth, AUGMENT[dtype])
        errors[dtype, impl] = (ours.double() - truth).abs().max()
    assert errors[TORCH] <= (single.double() - truth).abs().max() + AUGMENT_BESIDE_TORCHVISION
    for (dtype, impl), error in errors.items():
        assert dtype == torch.float64 or error <= errors[TORCH] + BESIDE_TORCH[impl]


class TestEachImplementation:
    @pytest.mark.parametrize(
        ("size", "count", "kind"),
        [
            (16, 24, "waves"),
            (33, 6, "noise"),
            (48, 4, "black and white"),
            *(pytest.param(size, 48, kind, marks=pytest.mark.long) for size in (33, 64) for kind in KINDS),
        ]
        if INTERPRETED
        else [*((size, 72, kind) for size in (16, 32, 33) for kind in KINDS), (224, 24, "waves"), (224, 3, "noise")],
    )
    def test_the_whole_chain_in_all_orders(self, size: int, count: int, kind: str) -> None:
        blurred_share = 4 if INTERPRETED else 6 if size == 224 else 2  # slow in torchvision
        drawn = random_parameters(count, blur=np.arange(count) % blurred_share == 0)
        assert_equals_torchvision(pictures(count, size, kind), drawn, plain_config(size))

    @pytest.mark.parametrize(
        ("size", "kind"),
        [(33, "waves")] if INTERPRETED else [*((size, kind) for size in (32, 33) for kind in KINDS), (224, "waves")],
    )
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
    def test_each_operation_alone(self, alone: dict[str, object], size: int, kind: str) -> None:
        assert_equals_torchvision(pictures(4, size, kind), parameters(4, **alone), plain_config(size))

    @pytest.mark.parametrize("kind", ["waves"] if INTERPRETED else ["black and white", "waves"])
    def test_the_widest_factors(self, kind: str) -> None:
        """0 and 2 clamp most of the values; then the order of the operations shows most."""
        rng = np.random.default_rng(0)
        count, choices = (12, {"blur": False}) if INTERPRETED else (48, {})
        factors = {name: rng.choice([0.0, 0.3, 2.0], count) for name in ("brightness", "contrast", "saturation")}
        drawn = random_parameters(count, **factors, hue=rng.choice([-0.5, 0.25, 0.5], count), **choices)
        assert_equals_torchvision(pictures(count, SIDE, kind), drawn, plain_config(SIDE))

    @pytest.mark.parametrize("size", [8] if INTERPRETED else [16, 33])
    @pytest.mark.parametrize("colour", COLOURS[-1:] if INTERPRETED else COLOURS)
    def test_one_colour(self, colour: tuple[int, int, int], size: int) -> None:
        """Divisions by zero and sums of nothing are near; one colour stays one."""
        crops, drawn = torch.tensor(colour, dtype=torch.uint8).expand(COUNT, size, size, 3), random_parameters(COUNT)
        assert_equals_torchvision(crops, drawn, plain_config(size))
        ours = augment(crops, drawn, plain_config(size), impl=IMPLEMENTATIONS[-1][1])
        assert (ours - ours[:, :, :1, :1]).abs().max() <= AUGMENT[torch.float32].max

    @each
    @pytest.mark.parametrize("shift", [-1e-20, 0.0, 1e-20, 1 / 6, -0.5, 0.5, 1.0, -3.75])
    def test_any_hue(self, shift: float, dtype: torch.dtype, impl: Impl) -> None:
        levels = torch.tensor([0, 1, 127, 255], dtype=torch.uint8)
        crops = torch.cartesian_prod(levels, levels, levels).reshape(1, 8, 8, 3)
        config, drawn = plain_config(8, blur_probability=0.0), parameters(1, jitter=True, hue=shift)
        truth = augment(crops, drawn, config, dtype=torch.float64)
        assert (augment(crops, drawn, config, dtype=dtype, impl=impl) - truth).abs().max() <= AUGMENT[dtype].max

    @each
    @pytest.mark.parametrize("sigma", [1e-6, 0.1, 0.15, 2.0, 5.0])
    @pytest.mark.parametrize(
        "size", [2, 16, pytest.param(50, marks=pytest.mark.long)] if INTERPRETED else [1, 2, 33, 230]
    )
    def test_any_sigma(self, size: int, sigma: float, dtype: torch.dtype, impl: Impl) -> None:
        """At 1 and 2 pixels, nearly every tap lies beyond the border."""
        crops, drawn = pictures(2, size), parameters(2, blur=True, sigma=sigma)
        config = plain_config(size, blur_sigma=(1e-6, max(2.0, sigma)))
        truth = augment(crops, drawn, config, dtype=torch.float64)
        ours = augment(crops, drawn, config, dtype=dtype, impl=impl)
        assert (ours - truth).abs().max() <= AUGMENT[dtype].max
        if sigma == 1e-6:
            plain = augment(crops, parameters(2), config, dtype=dtype, impl=impl)
            assert_close(ours, plain, AUGMENT[torch.float32])  # it weighs a neighbour by 5e-13

    @each
    @pytest.mark.parametrize("size", [33] if INTERPRETED else [32, 33, 224])
    def test_a_sample_without_augmentation_is_only_normalised(self, size: int, dtype: torch.dtype, impl: Impl) -> None:
        """Whatever its factors are, and whatever happens to its neighbours."""
        config, crops = ViewConfig(image_size=size), pictures(6, size)
        drawn = random_parameters(6, jitter=[0, 1] * 3, blur=[0, 1] * 3, grayscale=[0, 1] * 3, flip=[0, 1] * 3)
        ours = augment(crops, drawn, config, dtype=dtype, impl=impl)
        scalar = np.dtype(str(dtype).removeprefix("torch.")).type
        values = crops.permute(0, 3, 1, 2).numpy().astype(scalar) / scalar(255)
        mean, std = (np.array(numbers, dtype=scalar)[:, None, None] for numbers in (config.mean, config.std))
        plain = torch.from_numpy((values - mean) / std)
        assert torch.equal(ours[::2], plain[::2])
        assert not torch.isclose(ours[1::2], plain[1::2]).all(dim=(1, 2, 3)).any()

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, *([] if INTERPRETED else [torch.float64])]
    )
    @pytest.mark.parametrize(("count", "size"), [(3, 32), (0, 32), (1, 33), *([] if INTERPRETED else [(2, 224)])])
    @pytest.mark.parametrize("impl", ["triton"] if INTERPRETED else ["auto", "torch"])
    def test_shape_dtype_and_layout(self, count: int, size: int, dtype: torch.dtype, impl: Impl) -> None:
        crops, config = torch.zeros(count, size, size, 3, dtype=torch.uint8), ViewConfig(image_size=size)
        ours = augment(crops, random_parameters(count), config, dtype=dtype, impl=impl)
        assert ours.shape == (count, 3, size, size)
        assert ours.dtype == dtype
        assert count == 0 or ours.is_contiguous(memory_format=torch.channels_last)
        assert count == 0 or ours.stride() == (3 * size**2, 1, 3 * size, 3)

    @each_impl
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_float32_rounded_once(self, dtype: torch.dtype, impl: Impl) -> None:
        crops, drawn, config = pictures(COUNT, SIDE), random_parameters(COUNT), ViewConfig(image_size=SIDE)
        ours, expected = augment(crops, drawn, config, dtype=dtype, impl=impl), augment(crops, drawn, config, impl=impl)
        units = (ours.view(torch.int16).int() - expected.to(dtype).view(torch.int16).int()).abs().max()
        assert units <= ((dtype, impl) == (torch.bfloat16, "triton"))  # the interpreter cuts off where a GPU rounds

    @each_impl
    def test_crops_parameters_and_autocast_are_left_alone(self, impl: Impl) -> None:
        crops, drawn, config = pictures(COUNT, SIDE), random_parameters(COUNT), ViewConfig(image_size=SIDE)
        kept, table = crops.clone(), drawn.clone()
        with torch.autocast("cpu", torch.bfloat16):
            ours = augment(crops, drawn, config, impl=impl)
        assert torch.equal(ours, augment(crops, drawn, config, impl=impl))
        assert torch.equal(crops, kept)
        assert torch.equal(drawn, table)

    @each
    def test_crops_of_any_strides(self, dtype: torch.dtype, impl: Impl) -> None:
        count, choices = (6, {"jitter": False, "blur": [True, *[False] * 5]}) if INTERPRETED else (12, {})
        crops, config, drawn = pictures(count, 17), ViewConfig(image_size=17), random_parameters(count, **choices)

        def same(strided: Tensor, plain: Tensor) -> bool:
            table = drawn[: len(plain)]
            ours, expected = (augment(given, table, config, dtype=dtype, impl=impl) for given in (strided, plain))
            return torch.equal(ours, expected)

        views, larger = crops.unflatten(0, (-1, 3)).transpose(0, 1), pictures(count, 24)
        assert same(views, views.flatten(0, 1))
        assert same(crops[1::2], crops[1::2].clone())
        assert same(crops[:, None, None], crops)
        assert same(crops[3:4].expand(5, -1, -1, -1), crops[3:4].repeat(5, 1, 1, 1))
        assert same(crops.transpose(1, 2), crops.transpose(1, 2).contiguous())
        assert same(larger[:, 5:22, 2:19], larger[:, 5:22, 2:19].clone())

    @each_impl
    def test_a_view_depends_on_itself_alone(self, impl: Impl) -> None:
        crops, drawn, config = pictures(COUNT, 33), random_parameters(COUNT), ViewConfig(image_size=33)
        together = augment(crops, drawn, config, impl=impl)
        for first, stop in ((0, 1), (1, 3), (3, COUNT)):
            part = augment(crops[first:stop], drawn[first:stop], config, impl=impl)
            difference = (part - together[first:stop]).abs().max()
            assert difference <= (AUGMENT[torch.float32].max / min(config.std) if impl == "torch" else 0)


class TestTorch:
    def test_hue_is_torchvision_s_and_colorsys_s(self) -> None:
        levels = torch.tensor([0, 1, 100, 127, 128, 254, 255], dtype=torch.float64) / 255
        colours = torch.cartesian_prod(levels, levels, levels)  # [343, 3]: corners, edges and grays of the cube
        images = colours.T.reshape(1, 3, 7, 49)
        for shift in (-0.5, -0.1, 0.0, 1e-9, 1 / 6, 0.1, 0.49, 0.5):
            ours = adjust_hue(images, torch.tensor([shift], dtype=torch.float64))[0]
            assert_close(ours, exact_hue(images[0], shift), Tolerance(COLORSYS))
            assert_close(ours, V2.adjust_hue(images[0], shift), TORCHVISION_HUE)
            hsv = [colorsys.rgb_to_hsv(*colour) for colour in colours.tolist()]
            turned = torch.tensor([colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in hsv], dtype=torch.float64)
            assert_close(ours.flatten(1).T, turned, Tolerance(COLORSYS))

    @pytest.mark.parametrize("largest", [0.3, 2.0, 7.0])
    def test_the_blur_has_the_variance_that_is_asked_for(self, largest: float) -> None:
        """At every sigma, whatever the size of the view: it adds up to one, and equals three boxes in a row."""
        sigma = torch.tensor([0.001, 0.1, 0.25, 0.8, 1.0, 1.5, 2.0, 4.9, 7.0], dtype=torch.float64).clamp(max=largest)
        for size in (1, 32, 96, 224):
            weights = blur_weights(sigma, ViewConfig(image_size=size, blur_sigma=(0.001, largest)))
            taps = torch.arange(weights.shape[1])
            torch.testing.assert_close(weights[:, 0] + 2 * weights[:, 1:].sum(1), torch.ones(9).double())
            torch.testing.assert_close(2 * (weights * taps**2).sum(1), sigma**2, rtol=1e-9, atol=1e-11)
            for own, width in zip(weights.numpy(), sigma.tolist(), strict=True):
                expected = three_boxes(width)[len(three_boxes(width)) // 2 :]
                length = max(len(own), len(expected))
                difference = [np.pad(part, (0, length - len(part))) for part in (own, expected)]
                np.testing.assert_allclose(*difference, atol=1e-12)

    def test_nothing_is_read_back_from_the_device(self) -> None:
        """The meta device holds no values: whatever asked for one would raise."""
        drawn = random_parameters(24).to("meta")
        ours = augment(pictures(24, 32).to("meta"), drawn, ViewConfig(image_size=32), dtype=torch.bfloat16)
        assert ours.shape == (24, 3, 32, 32)
        assert ours.dtype == torch.bfloat16
        assert ours.is_contiguous(memory_format=torch.channels_last)


class TestAgainstThePublishedPath:
    """MoCo-v2 as published: torchvision on PIL images, PIL's blur, uint8 after each step. Differences in levels."""

    def differences(self, count: int, size: int, kind: str, drawn: Tensor) -> Tensor:
        crops = pictures(count, size, kind)
        ours = augment(crops, drawn, plain_config(size), dtype=torch.float64).permute(0, 2, 3, 1) * 255
        theirs = [self.published(Image.fromarray(crop.numpy()), row) for crop, row in zip(crops, drawn, strict=True)]
        return ours - torch.from_numpy(np.stack(theirs)).double()

    def published(self, image: Image.Image, row: Tensor) -> np.ndarray:
        factors, order = row[:4].tolist(), row[4:8].long().tolist()
        jitter, grayscale, blur, flip, sigma = row[8:].tolist()
        functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        nothing = tuple(NOTHING.values())
        for operation in order if jitter else ():
            if factors[operation] != nothing[operation]:
                image = functions[operation](image, factors[operation])
        if grayscale:
            image = TF.to_grayscale(image, num_output_channels=3)
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(radius=sigma))
        if flip:
            image = TF.hflip(image)
        return np.asarray(image)

    def test_the_blur(self) -> None:
        """The other operations are torchvision's own on either path."""
        drawn = parameters(12, blur=True, sigma=np.linspace(0.1, 2.0, 12))
        difference = self.differences(12, 224, "waves", drawn).abs()
        assert difference.max() <= PIL_BLUR.max
        assert difference.mean() <= PIL_BLUR.mean

    @pytest.mark.parametrize("size", [32, 96, 224])
    def test_the_whole_chain_in_all_orders(self, size: int) -> None:
        difference = self.differences(24, size, "waves", random_parameters(24)).abs()
        assert difference.max() <= PIL_CHAIN.max
        assert difference.mean() <= PIL_CHAIN.mean


if INTERPRETED:

    class TestInterpreted:
        def test_any_number_of_views_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
            crops, drawn, config = pictures(19, 16), random_parameters(19, grayscale=False), plain_config(16)
            expected = augment(crops, drawn, config, impl="triton")
            monkeypatch.setattr("pipelines.augment_triton._PLANE_ELEMENTS", 1)  # 16 views
            assert torch.equal(augment(crops, drawn, config, impl="triton"), expected)


class TestNumba:
    """A view's result depends on its crop and its parameters, and on nothing else."""

    crops, drawn, config = pictures(50, 33), random_parameters(50), ViewConfig(image_size=33)
    given = crops, drawn, blur_weights(drawn[:, SIGMA], config), config

    @pytest.mark.parametrize("num_threads", [2, 3, 7, 64])
    def test_any_number_of_threads(self, num_threads: int) -> None:
        one, many = (augment_numba(*self.given, number) for number in (1, num_threads))
        assert torch.equal(one, many)

    def test_many_callers_at_once(self) -> None:
        expected = augment(self.crops, self.drawn, self.config, impl="numba")
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda _: augment_numba(*self.given, 2), range(16))
        assert all(torch.equal(result, expected) for result in results)

    def test_in_a_forked_process(self) -> None:
        """The threads that the parent has are not there."""
        expected = augment_numba(*self.given, 2)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def in_child() -> None:
            sender.send(augment_numba(*self.given, 2).numpy())

        child = context.Process(target=in_child)
        child.start()
        assert receiver.poll(60)
        assert np.array_equal(receiver.recv(), expected.numpy())
        child.join()

    def test_as_many_threads_as_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(compiled, "augment_numba", lambda *given: seen.append(given[-1]) or torch.zeros(1))
        before = torch.get_num_threads()
        try:
            for number in (1, 3):
                torch.set_num_threads(number)
                augment(self.crops, self.drawn, self.config)
        finally:
            torch.set_num_threads(before)
        assert seen == [1, 3]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_it_is_taken_on_a_cpu_but_for_float64(self, dtype: torch.dtype) -> None:
        auto, plain, ours = (
            augment(self.crops, self.drawn, self.config, dtype=dtype, impl=impl)
            for impl in ("auto", "torch", "torch" if dtype == torch.float64 else "numba")
        )
        assert torch.equal(auto, ours)
        assert torch.equal(auto, plain) == (dtype == torch.float64) or dtype == torch.bfloat16

    def test_one_that_does_not_work(
        self, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
    ) -> None:
        def broken() -> None:
            raise ImportError("Numba needs NumPy 2.0 or less")

        monkeypatch.setattr(compiled, "compiled_kernel", broken)
        kernels.automatic_impl.cache_clear()
        for _ in range(2):
            auto, plain = (augment(self.crops, self.drawn, self.config, impl=impl) for impl in ("auto", "torch"))
            assert torch.equal(auto, plain)
        kernels.automatic_impl.cache_clear()
        (record,) = package_log.records
        assert record.levelname == "WARNING"
        assert "views are augmented by torch, many times slower, since numba does not work here" in record.getMessage()


def batch_of(crops: Tensor, indices: np.ndarray, epoch: int = 0) -> CropBatch:
    return CropBatch(
        crops=crops,
        labels=torch.zeros(len(crops), dtype=torch.int64),
        indices=indices,
        boxes=np.zeros((*crops.shape[:2], 4), dtype=np.int32),
        epoch=epoch,
        step=0,
    )


class TestViews:
    config = ViewConfig(image_size=32)

    def test_each_view_is_augmented_by_its_own_parameters(self) -> None:
        crops, indices = pictures(30, 32).unflatten(0, (10, 3)), np.arange(100, 110)
        views = augmented_views(batch_of(crops, indices, epoch=3), LEOCLR_VIEWS, self.config, seed=5)
        assert len(views) == 3
        for number, (view, recipe) in enumerate(zip(views, LEOCLR_VIEWS, strict=True)):
            drawn = draw_augmentation((recipe,), self.config, 5, 3, indices)
            assert torch.equal(view, augment(crops[:, number], drawn, self.config))
            assert view.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("views", [LEOCLR_VIEWS, CENTER_CROP_VIEWS])
    def test_an_empty_batch(self, views: ViewRecipe) -> None:
        crops = torch.zeros(0, len(views), 32, 32, 3, dtype=torch.uint8)
        result = augmented_views(batch_of(crops, np.empty(0, dtype=np.int64)), views, self.config, seed=0)
        assert [view.shape for view in result] == [(0, 3, 32, 32)] * len(views)

    def test_evaluation_views(self) -> None:
        crops, indices = pictures(200, 32)[:, None], np.arange(200)
        plain = augment(crops[:, 0], parameters(200), self.config)
        (center,) = augmented_views(batch_of(crops, indices), CENTER_CROP_VIEWS, self.config, seed=0)
        assert torch.equal(center, plain)
        (linear,) = augmented_views(batch_of(crops, indices), LINEAR_TRAIN_VIEWS, self.config, seed=0)
        flipped = (linear == plain.flip(-1)).all(dim=-1).all(dim=-1).all(dim=-1)
        kept = (linear == plain).all(dim=-1).all(dim=-1).all(dim=-1)
        assert (flipped ^ kept).all()
        assert 60 < flipped.sum() < 140


NUM_DRAWN = 20_000


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    return draw_augmentation((LEOCLR_VIEWS[1],), ViewConfig(), 0, 0, np.arange(NUM_DRAWN))


@pytest.fixture(scope="module")
def color_jitters() -> list[tuple[Tensor, float, float, float, float]]:
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [ColorJitter.get_params(*ranges) for _ in range(5_000)]


class TestDraws:
    """Every parameter's distribution against torchvision's."""

    @pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
    def test_factors(self, operation: int, drawn: Tensor, color_jitters: list[tuple]) -> None:
        ours = drawn[:, operation].numpy()
        assert stats.ks_2samp(ours, [sample[1 + operation] for sample in color_jitters]).pvalue > 1e-3
        low, high = (-0.1, 0.1) if operation == HUE else (0.6, 1.4)
        assert stats.kstest(ours, stats.uniform(low, high - low).cdf).pvalue > 1e-3
        assert ours.min() >= low
        assert ours.max() < high

    def test_order(self, drawn: Tensor, color_jitters: list[tuple]) -> None:
        names = {tuple(order): number for number, order in enumerate(ORDERS.tolist())}
        assert len(names) == 24
        ours = np.bincount([names[tuple(order)] for order in drawn[:, ORDER].long().tolist()], minlength=24)
        theirs = np.bincount([names[tuple(sample[0].tolist())] for sample in color_jitters], minlength=24)
        assert stats.chisquare(ours).pvalue > 1e-3
        assert stats.chi2_contingency(np.stack((ours, theirs))).pvalue > 1e-3

    def test_sigma(self, drawn: Tensor) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = [GaussianBlur.get_params(0.1, 2.0) for _ in range(5_000)]
        assert stats.ks_2samp(drawn[:, SIGMA].numpy(), theirs).pvalue > 1e-3
        assert stats.kstest(drawn[:, SIGMA].numpy(), stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3

    @pytest.mark.parametrize(("flag", "probability"), [(JITTER, 0.8), (GRAYSCALE, 0.2), (BLUR, 0.5), (FLIP, 0.5)])
    def test_probabilities(self, flag: int, probability: float, drawn: Tensor) -> None:
        applied = int(drawn[:, flag].sum())
        assert stats.binomtest(applied, NUM_DRAWN, probability).pvalue > 1e-3

    def test_parameters_are_independent_of_one_another(self, drawn: Tensor) -> None:
        columns = torch.cat((drawn[:, :5], drawn[:, 8:]), dim=1).numpy()
        other_views = [
            draw_augmentation((view,), ViewConfig(), 0, epoch, np.arange(NUM_DRAWN))[:, :4].numpy()
            for view, epoch in ((LEOCLR_VIEWS[0], 0), (LEOCLR_VIEWS[2], 0), (LEOCLR_VIEWS[1], 1))
        ]
        together = np.concatenate((columns, *other_views), axis=1)
        correlations = stats.spearmanr(together).statistic[np.triu_indices(together.shape[1], 1)]
        assert np.abs(correlations).max() < 4.5 / np.sqrt(NUM_DRAWN)

    def test_a_pure_function_of_seed_epoch_index_and_view(self) -> None:
        indices, config = np.array([3, 1, 4, 1, 5, 9]), ViewConfig()
        whole = draw_augmentation(LEOCLR_VIEWS, config, 7, 2, indices).unflatten(0, (3, 6))
        assert torch.equal(whole[:, 1], whole[:, 3])
        for row, index in enumerate(indices):
            alone = draw_augmentation(LEOCLR_VIEWS, config, 7, 2, np.array([index]))
            assert torch.equal(whole[:, row], alone)
        assert torch.equal(draw_augmentation(MOCOV2_VIEWS, config, 7, 2, indices), whole[1:].flatten(0, 1))
        different = [
            draw_augmentation((view,), config, seed, epoch, indices)
            for view, seed, epoch in ((LEOCLR_VIEWS[0], 7, 2), (LEOCLR_VIEWS[1], 7, 3), (LEOCLR_VIEWS[1], 8, 2))
        ]
        assert all((table[:, 0] != whole[1, :, 0]).all() for table in different)

    def test_values_are_the_same_for_ever(self) -> None:
        drawn = draw_augmentation(MOCOV2_VIEWS, ViewConfig(), 0, 0, np.array([0, 1]))
        assert drawn.shape == (4, 13)
        assert drawn[0, : HUE + 1].tolist() == pytest.approx([1.22306726, 0.77609687, 0.74372298, 0.09315662], abs=1e-8)
        assert drawn[:, ORDER].tolist() == [[0, 3, 1, 2], [3, 1, 0, 2], [0, 2, 3, 1], [2, 3, 1, 0]]
        assert drawn[:, JITTER].tolist() == [1, 1, 1, 0]
        assert drawn[:, GRAYSCALE].tolist() == [0, 1, 0, 0]
        assert drawn[:, BLUR].tolist() == [1, 1, 0, 1]
        assert drawn[:, FLIP].tolist() == [0, 1, 0, 1]
        assert drawn[:, SIGMA].tolist() == pytest.approx([1.54482306, 1.42836504, 0.89181191, 1.88231672], abs=1e-8)
