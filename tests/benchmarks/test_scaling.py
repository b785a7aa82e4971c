"""Scaling at a size that a CPU gets through in seconds."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.scaling import Point, ScalingConfig, bench_scaling, scaling_markdown, time_ranks
from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.config import SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.methods import build_method

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
TINY = BenchSetting(
    recipe="leoclr_demo", batch_size=9, queue_size=64, image_size=16, width_multiplier=0.0625, key_batchnorm="shuffle"
)
CPU = SpeedConfig(device="cpu", precision="fp32", compile="off")


@pytest.fixture(scope="module")
def written() -> tuple[dict[str, Any], str]:
    """The document and the page, of one rank and of two."""
    config = ScalingConfig(ranks=(1, 2), rounds=2, steps=2, warmup_steps=1, limit_s=120)
    document = bench_scaling(config, TINY, CPU)
    return document, scaling_markdown(document)


def test_rows(written: tuple[dict[str, Any], str]) -> None:
    rows = written[0]["rows"]
    assert [(row["mode"], row["ranks"], row["batch_size"]) for row in rows] == [
        ("weak", 1, 9), ("weak", 2, 18), ("strong", 1, 9), ("strong", 2, 9),
    ]  # fmt: skip
    for row in rows:
        assert len(row["rounds_step_ms"]) == 2
        assert row["step_ms"] == pytest.approx(np.median(row["rounds_step_ms"]))
        assert row["images_per_s"] == pytest.approx(
            np.median([1000 * row["batch_size"] / t for t in row["rounds_step_ms"]])
        )
        assert row["images_per_s_q20"] <= row["images_per_s"] <= row["images_per_s_q80"]
    assert rows[0]["rounds_step_ms"] == rows[2]["rounds_step_ms"]
    for alone, two in (rows[:2], rows[2:]):
        assert (alone["efficiency"], alone["communication_share"]) == (1, 0)
        rates = [[1000 * row["batch_size"] / row["ranks"] / ms for ms in row["rounds_step_ms"]] for row in (alone, two)]
        ratios = [of_two / of_one for of_one, of_two in zip(*rates, strict=True)]
        assert two["efficiency"] == pytest.approx(quantiles("efficiency", ratios)["efficiency"])
        assert 0 < two["communication_share"] < 1


def test_bytes_are_what_the_sizes_of_network_and_views_say(written: tuple[dict[str, Any], str]) -> None:
    result = ScalingConfig().result(TINY, "weak", 2)
    method = build_method(result, Ranks())
    num_gradients = sum(weight.numel() for weight in method.trained_weights())
    num_statistics = sum(b.numel() for b in method.kept_encoder.buffers() if b.is_floating_point())
    for row in written[0]["rows"]:
        local = 9 if row["mode"] == "weak" else 5
        volume = {
            "all_reduce": 4 * num_gradients + 4 * num_statistics,
            "all_gather": 4 * 2 * 2 * local * result.method.projection_dim,
            "all_to_all": 2 * local * (16 * 16 * 3 + 13 * 8),
        }
        assert row["bytes_counted"] == ({} if row["ranks"] == 1 else volume)


def test_page(written: tuple[dict[str, Any], str]) -> None:
    document, page = written
    assert "it says nothing of GPUs and NCCL" in page
    assert f"| weak | 2 | 18 | {document['rows'][1]['images_per_s']:,.1f} [" in page


class TestBadInput:
    def test_values(self) -> None:
        for ranks in ((2, 2), (0,), ()):
            with pytest.raises(ValueError, match="is not allowed: give different numbers from 1"):
                ScalingConfig(ranks=ranks)
        with pytest.raises(ValueError, match="a global batch of 9 cannot be shared by 10 ranks"):
            bench_scaling(ScalingConfig(ranks=(10,), mode="strong"), TINY, CPU)

    @pytest.mark.parametrize(
        ("num_ranks", "limit_s", "method", "message"),
        [
            (1, 60.0, "none", "rank 0 failed"),  # there is no such method
            (2, 0.1, "leoclr", r"rank 0 has not answered for 0\.1 s; rank 1 has not answered for 0\.1 s"),
        ],
        ids=["fails", "too long"],
    )
    def test_a_rank_that_fails_or_takes_too_long_ends_all(
        self, num_ranks: int, limit_s: float, method: str, message: str
    ) -> None:
        config = ScalingConfig(steps=1, warmup_steps=1, limit_s=limit_s)
        result = config.result(TINY, "weak", num_ranks)
        result = replace(result, method=replace(result.method, name=method))
        with pytest.raises(RuntimeError, match=message):
            time_ranks(Point(mode="weak", num_ranks=num_ranks, result=result), config, CPU, 1)
        assert not multiprocessing.active_children()
