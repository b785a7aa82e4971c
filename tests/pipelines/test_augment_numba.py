"""The augmentation that numba compiles, beside what test_augment.py asks of both: threads, choice, numba's troubles."""

from __future__ import annotations

import errno
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core import caching
from torch import Tensor

from pipelines import augment as module
from pipelines import augment_numba as compiled
from pipelines.augment import AugmentParameters, augment, draw_augmentation
from pipelines.augment_numba import augment_numba
from pipelines.config import ViewConfig
from pipelines.views import LEOCLR_VIEWS
from tests.pipelines.test_augment import (
    assert_equals_torchvision,
    parameters,
    pictures,
    plain_config,
    random_parameters,
)
from tests.tolerances import AUGMENT


class TestDegenerateImages:
    """torchvision's truth where divisions by zero and sums of nothing are near."""

    @pytest.mark.parametrize("size", [16, 33])
    @pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (7, 7, 7), (255, 0, 0), (3, 200, 99)])
    def test_one_colour(self, colour: tuple[int, int, int], size: int) -> None:
        crops = torch.tensor(colour, dtype=torch.uint8).expand(24, size, size, 3)
        assert_equals_torchvision(crops, random_parameters(24), plain_config(size))

    def test_one_colour_stays_one_colour(self) -> None:
        crops = torch.tensor((3, 200, 99), dtype=torch.uint8).expand(24, 33, 33, 3)
        ours = augment(crops, random_parameters(24), plain_config(33), impl="numba")
        assert (ours - ours[:, :, :1, :1]).abs().max() <= AUGMENT[torch.float32].max

    @pytest.mark.parametrize("shift", [-1e-20, 0.0, 1e-20, 1 / 6, -0.5, 0.5, 1.0, -3.75])
    def test_any_hue(self, shift: float) -> None:
        levels = torch.tensor([0, 1, 127, 255], dtype=torch.uint8)
        crops = torch.cartesian_prod(levels, levels, levels).reshape(1, 8, 8, 3)
        drawn = parameters(1, jitter=True, hue=shift)
        truth, ours = (
            augment(crops, drawn, plain_config(8, blur_probability=0.0), dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        )
        assert (ours - truth).abs().max() <= AUGMENT[torch.float32].max

    @pytest.mark.parametrize("sigma", [1e-6, 0.1, 0.15, 2.0, 1e3])
    @pytest.mark.parametrize("size", [16, 33, 230])
    def test_any_sigma(self, size: int, sigma: float) -> None:
        crops, drawn = pictures(2, size), parameters(2, blur=True, sigma=sigma)
        truth, ours = (
            augment(crops, drawn, plain_config(size), dtype=dtype) for dtype in (torch.float64, torch.float32)
        )
        assert (ours - truth).abs().max() <= AUGMENT[torch.float32].max
        if sigma == 1e-6:
            assert torch.equal(ours, augment(crops, parameters(2), plain_config(size)))

    def test_a_blur_that_reaches_from_side_to_side(self) -> None:
        """A radius of one pixel less than the side: every tap of the border is a reflected one."""
        crops, drawn = pictures(4, 2), parameters(4, blur=True, sigma=[0.3, 1.0, 2.0, 50.0])
        assert_equals_torchvision(crops, drawn, plain_config(2))


class TestAlone:
    """A view's result depends on its crop and its parameters, and on nothing else."""

    crops, drawn, config = pictures(50, 33), random_parameters(50), ViewConfig(image_size=33)

    @pytest.mark.parametrize("num_threads", [2, 3, 7, 64])
    def test_any_number_of_threads(self, num_threads: int) -> None:
        one, many = (augment_numba(self.crops, self.drawn.table, self.config, number) for number in (1, num_threads))
        assert torch.equal(one, many)

    def test_any_batch(self) -> None:
        together = augment(self.crops, self.drawn, self.config, impl="numba")
        for first, stop in ((0, 1), (1, 3), (3, 20), (20, 50)):
            part = AugmentParameters(self.drawn.table[first:stop])
            assert torch.equal(augment(self.crops[first:stop], part, self.config, impl="numba"), together[first:stop])

    def test_many_callers_at_once(self) -> None:
        expected = augment(self.crops, self.drawn, self.config, impl="numba")
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda _: augment_numba(self.crops, self.drawn.table, self.config, 2), range(16))
        assert all(torch.equal(result, expected) for result in results)

    def test_in_a_forked_process(self) -> None:
        """The threads that the parent has are not there."""
        expected = augment_numba(self.crops, self.drawn.table, self.config, 2)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def in_child() -> None:
            sender.send(augment_numba(self.crops, self.drawn.table, self.config, 2).numpy())

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


class TestChoice:
    crops, drawn, config = pictures(24, 32), random_parameters(24), ViewConfig(image_size=32)

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        auto, plain = (
            augment(self.crops, self.drawn, self.config, dtype=dtype, impl=impl) for impl in ("auto", "torch")
        )
        return auto, plain

    def test_float64_is_torch_s(self) -> None:
        auto, plain = self.results(torch.float64)
        assert torch.equal(auto, plain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_anything_else_on_a_cpu_is_numba_s(self, dtype: torch.dtype) -> None:
        auto, plain = self.results(dtype)
        assert torch.equal(auto, augment(self.crops, self.drawn, self.config, dtype=dtype, impl="numba"))
        if dtype == torch.float32:
            assert not torch.equal(auto, plain)

    def test_elsewhere_it_is_torch(self) -> None:
        meta = torch.device("meta")
        assert augment(self.crops.to(meta), self.drawn.to(meta), self.config).device == meta
        with pytest.raises(ValueError, match=r"since the crops are on meta, .* only the CPU; choose impl"):
            augment(self.crops.to(meta), self.drawn.to(meta), self.config, impl="numba")

    def test_gradients_are_torch_s(self) -> None:
        drawn = AugmentParameters(self.drawn.table.clone().requires_grad_())
        augment(self.crops, drawn, self.config).sum().backward()
        assert drawn.table.grad is not None
        assert drawn.table.grad[:, 0].abs().min() > 0
        with pytest.raises(ValueError, match="gives them no gradients"):
            augment(self.crops, drawn, self.config, impl="numba")

    def test_what_numba_cannot_do_is_an_error_where_it_is_asked_for(self) -> None:
        with pytest.raises(ValueError, match=r"computes in float32, not float64; choose impl auto or torch"):
            augment(self.crops, self.drawn, self.config, dtype=torch.float64, impl="numba")
        with pytest.raises(ValueError, match=r"squares of uint8 RGB, and these are torch.float32 \[24, 32, 32, 3\]"):
            augment(self.crops.float(), self.drawn, self.config, impl="numba")
        with pytest.raises(ValueError, match=r"squares of uint8 RGB, and these are torch.uint8 \[24, 16, 32, 3\]"):
            augment(self.crops[:, :16], self.drawn, self.config, impl="numba")

    def test_a_numba_that_does_not_work(
        self, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
    ) -> None:
        def broken() -> None:
            raise ImportError("Numba needs NumPy 2.0 or less")

        monkeypatch.setattr(compiled, "compiled_kernel", broken)
        module._what_is_wrong_with_numba.cache_clear()
        try:
            for _ in range(2):
                auto, plain = self.results(torch.float32)
                assert torch.equal(auto, plain)
            with pytest.raises(ValueError, match=r"does not work on this machine: .*NumPy 2.0 or less"):
                augment(self.crops, self.drawn, self.config, impl="numba")
        finally:
            module._what_is_wrong_with_numba.cache_clear()
        (record,) = package_log.records
        assert record.levelname == "WARNING"
        assert "views are augmented by torch, many times slower" in record.getMessage()

    def test_numba_is_imported_when_it_is_needed(self) -> None:
        code = (
            "import sys, numpy, torch; from pipelines.augment import *; from pipelines.config import ViewConfig\n"
            "from pipelines.views import LEOCLR_VIEWS\n"
            "config, crops = ViewConfig(image_size=32), torch.zeros(6, 32, 32, 3, dtype=torch.uint8)\n"
            "drawn = draw_augmentation(LEOCLR_VIEWS, config, 0, 0, numpy.arange(2))\n"
            "augment(crops, drawn, config, dtype=torch.float64); augment(crops, drawn, config, impl='torch')\n"
            "assert 'numba' not in sys.modules\n"
            "augment(crops, drawn, config); assert 'numba' in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def trivial(
    pixels: Any, starts: Any, table: Any, output: Any, side: Any, radius: Any, switches: Any, mean: Any, std: Any,
    scratch: Any, sums: Any, first: Any, stop: Any,
) -> None:  # fmt: skip
    output[0] = 42.0


class TestNumbasCache:
    """On the disk, with a kernel that is compiled at once."""

    @pytest.fixture(autouse=True)
    def _another_kernel(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        monkeypatch.setattr(compiled, "_augment", trivial)
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def run(self) -> Any:
        output, flags, starts = np.zeros(3, dtype=np.float32), np.zeros(4, dtype=bool), np.zeros(1, dtype=np.int64)
        pixels, table, sums = np.zeros(3, dtype=np.uint8), np.zeros((1, 13)), np.zeros(1)
        kernel = compiled.compiled_kernel.__wrapped__()
        kernel(pixels, starts, table, output, 1, 0, flags, output, output, output, sums, 0, 1)
        assert output[0] == 42
        return kernel

    def test_a_second_process_compiles_nothing(self) -> None:
        assert not self.run().stats.cache_hits
        assert sum(self.run().stats.cache_hits.values()) == 1

    def test_no_folder_can_be_written_to(
        self, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
    ) -> None:
        def read_only(locator: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", read_only)
        assert not self.run().stats.cache_hits
        assert "numba's cache is out of use" in package_log.text

    def test_a_full_disk(self, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture) -> None:
        def full(*given: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
        assert not self.run().stats.cache_hits
        assert "No space left on device" in package_log.text


def test_what_training_draws_is_augmented_the_same() -> None:
    config, crops = ViewConfig(image_size=64), pictures(30, 64, "waves")
    drawn = draw_augmentation(LEOCLR_VIEWS, config, 0, 0, np.arange(10))
    truth, ours = (augment(crops, drawn, config, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert (ours - truth).abs().max() <= AUGMENT[torch.float32].max / min(config.std)
