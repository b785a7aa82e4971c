"""The Triton kernels as a GPU runs them: against float64, in little memory, in a CUDA graph.

That they wait for nothing is seen in `test_captured_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.calls import captured
from benchmarks.kernels import cross_entropies
from leoclr_fast.bench.timing import peak_extra_mib
from leoclr_fast.losses.info_nce import info_nce
from pipelines import augment_triton as fused
from pipelines.augment import augment, draw_augmentation
from pipelines.config import ViewConfig
from pipelines.views import LEOCLR_VIEWS
from tests.leoclr_fast.losses.test_info_nce import unit_vectors
from tests.pipelines.test_augment import pictures, plain_config, random_parameters
from tests.tolerances import AUGMENT_TRITON_ON_GPU, INFO_NCE_TRITON_ON_GPU

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

GPU = torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAPER = (256, 65536, 128, 2)


class TestLoss:
    def tensors(
        self, B: int, K: int, D: int, P: int, dtype: torch.dtype, length: float = 1.0
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        query, queue, *keys = (
            (length * unit_vectors(rows, D, seed)).to(GPU, dtype) for seed, rows in enumerate([B, K, *[B] * P])
        )
        return query.requires_grad_(), keys, queue

    def call(
        self, query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float = 0.2, impl: str = "triton"
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            loss = info_nce(query, keys, queue, temperature, impl)  # type: ignore[arg-type]
            return loss.detach(), torch.autograd.grad(loss, query)[0]

        return call

    def assert_accurate(
        self, query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float, ours: tuple[Tensor, Tensor]
    ) -> None:
        """Against float64 from the rounded inputs, some queries at a time."""
        loss, gradients = torch.zeros((), dtype=torch.float64, device=GPU), []
        for rows in torch.arange(len(query), device=GPU).split(64):
            part = query.detach()[rows].double().requires_grad_()
            value = cross_entropies(part, [key[rows].double() for key in keys], queue.double(), temperature)
            value = value * (len(rows) / len(query))
            gradients.append(torch.autograd.grad(value, part)[0])
            loss += value.detach()
        tolerance = INFO_NCE_TRITON_ON_GPU[query.dtype]
        for mine, truth, allowed in zip(
            ours, (loss, torch.cat(gradients)), (tolerance.loss, tolerance.gradient), strict=True
        ):
            assert ((mine.double() - truth).norm() / truth.norm()).item() <= allowed

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "sizes",
        [PAPER, (256, 65536, 128, 1), (7, 123, 33, 2), (1, 507, 16, 3), (252, 4099, 100, 2), (70, 1000, 300, 2)],
    )
    def test_against_float64(self, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        query, keys, queue = self.tensors(*sizes, dtype)
        self.assert_accurate(query, keys, queue, 0.2, self.call(query, keys, queue)())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_extra_memory(self, dtype: torch.dtype) -> None:
        call = self.call(*self.tensors(*PAPER, dtype))
        call()
        taken = peak_extra_mib(call, GPU)
        assert taken is not None
        assert 0 < taken < 20

    def test_every_run_gives_the_same_bits(self) -> None:
        call = self.call(*self.tensors(*PAPER, torch.bfloat16))
        (loss, gradient), *others = (call() for _ in range(5))
        assert all(torch.equal(loss, again) and torch.equal(gradient, other) for again, other in others)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_in_a_cuda_graph(self, dtype: torch.dtype) -> None:
        """Replayed with other numbers in the same places."""
        query, keys, queue = self.tensors(32, 1000, 128, 2, dtype)
        call = self.call(query, keys, queue)
        call()
        replay = captured(call)
        with torch.no_grad():
            for number, tensor in enumerate((query, *keys, queue)):
                tensor.copy_(unit_vectors(len(tensor), 128, 50 + number))
        ours, expected = replay(), call()
        torch.cuda.synchronize()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, expected, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_auto_takes_it_but_not_for_float64(self, dtype: torch.dtype) -> None:
        query, keys, queue = self.tensors(8, 64, 32, 1, dtype)
        auto, eager = (info_nce(query, keys, queue, 0.2, impl) for impl in ("auto", "eager"))
        assert (type(auto.grad_fn).__name__ == "_InfoNCEBackward") == (dtype == torch.float32)
        torch.testing.assert_close(auto.double(), eager.double(), rtol=1e-5, atol=0)


class TestAugmentation:
    @pytest.mark.parametrize(
        ("size", "count", "kind"),
        [
            (224, 24, "waves"),
            (224, 24, "noise"),
            (224, 200, "waves"),
            (96, 48, "noise"),
            (33, 48, "waves"),
            (2, 24, "noise"),
        ],
    )
    def test_against_float64(self, size: int, count: int, kind: str) -> None:
        crops, drawn = pictures(count, size, kind).to(GPU), random_parameters(count).to(GPU)
        ours = augment(crops, drawn, plain_config(size), impl="triton")
        for rows in torch.arange(count).split(24):
            truth = augment(crops[rows], drawn[rows], plain_config(size), dtype=torch.float64)
            difference = (ours[rows].double() - truth).abs()
            assert difference.max().item() <= AUGMENT_TRITON_ON_GPU.max
            assert difference.mean().item() <= AUGMENT_TRITON_ON_GPU.mean

    def test_auto_takes_it_for_views_as_training_has_them(self) -> None:
        config, crops = ViewConfig(image_size=64), pictures(24, 64).to(GPU)
        drawn = draw_augmentation(LEOCLR_VIEWS, config, 0, 0, np.arange(8)).to(GPU)
        strided = crops.unflatten(0, (8, 3)).transpose(0, 1)
        auto = augment(strided, drawn, config, dtype=torch.bfloat16)
        assert torch.equal(auto, augment(strided.flatten(0, 1), drawn, config, dtype=torch.bfloat16, impl="triton"))
        assert (auto.float() - augment(strided, drawn, config, impl="torch")).abs().max() < 0.02

    def test_any_number_of_views_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        crops, drawn, config = pictures(40, 33).to(GPU), random_parameters(40).to(GPU), plain_config(33)
        expected = augment(crops, drawn, config, impl="triton")
        monkeypatch.setattr(fused, "_PLANE_ELEMENTS", 1)
        assert torch.equal(augment(crops, drawn, config, impl="triton"), expected)

    def test_in_a_cuda_graph(self) -> None:
        """Replayed with other crops and parameters in the same places."""
        crops, drawn, config = pictures(24, 64).to(GPU), random_parameters(24).to(GPU), ViewConfig(image_size=64)

        def call() -> Tensor:
            return augment(crops, drawn, config, dtype=torch.bfloat16, impl="triton")

        call()
        replay = captured(call)
        crops.copy_(pictures(24, 64, "waves"))
        drawn.copy_(random_parameters(24, seed=1))
        ours, expected = replay(), call()
        torch.cuda.synchronize()
        assert torch.equal(ours, expected)
