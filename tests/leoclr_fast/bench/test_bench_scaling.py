"""`bench scaling` at a size that a CPU gets through in seconds, and the model that it fits."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest

from leoclr_fast.bench.communication_volume import communication_volume
from leoclr_fast.bench.rank_team import RankTeam, TeamConfig, TeamTurn
from leoclr_fast.bench.scaling import ScalingConfig, bench_scaling
from leoclr_fast.bench.scaling_model import ScalingPoint, fit_scaling_model
from leoclr_fast.bench.scaling_report import scaling_markdown
from leoclr_fast.bench.setting import BenchSetting
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.cli import run_command
from leoclr_fast.config import SpeedConfig
from leoclr_fast.method.methods import build_method
from tests.leoclr_fast.conftest import tiny_config

TINY = BenchSetting(
    recipe="leoclr_demo", batch_size=9, queue_size=64, image_size=16, width_multiplier=0.0625, key_batchnorm="shuffle"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The document and the page of the command on one rank and on two."""
    page, output = tmp_path_factory.mktemp("scaling") / "scaling.md", StringIO()
    flags = [
        "--ranks", "1", "2", "--recipe=leoclr_demo", "--batch-size=9", "--queue-size=64", "--image-size=16",
        "--width-multiplier=0.0625", "--key-batchnorm=shuffle", "--device=cpu", "--gradient-compression=bf16",
        "--rounds=2", "--steps=2", "--warmup-steps=1", "--limit-s=120", f"--markdown={page}", "--json",
    ]  # fmt: skip
    with redirect_stdout(output):
        assert run_command(["bench", "scaling", *flags]) == 0
    return json.loads(output.getvalue().splitlines()[-1]), page.read_text()


@pytest.mark.timeout(300)
def test_rows(written: tuple[dict[str, Any], str]) -> None:
    rows = written[0]["rows"]
    assert [(row["mode"], row["ranks"], row["batch_size"]) for row in rows] == [
        ("weak", 1, 9), ("weak", 2, 18), ("strong", 1, 9), ("strong", 2, 9),
    ]  # fmt: skip
    for row in rows:
        assert len(row["turns_step_ms"]) == 2
        assert row["step_ms"] == pytest.approx(np.median(row["turns_step_ms"]))
        assert row["images_per_s"] == pytest.approx(
            np.median([1000 * row["batch_size"] / t for t in row["turns_step_ms"]])
        )
        assert row["images_per_s_q20"] <= row["images_per_s"] <= row["images_per_s_q80"]
    assert rows[0]["turns_step_ms"] == rows[2]["turns_step_ms"]
    for alone, two in (rows[:2], rows[2:]):
        assert (alone["efficiency"], alone["communication_share"]) == (1, 0)
        rates = [[1000 * row["batch_size"] / row["ranks"] / ms for ms in row["turns_step_ms"]] for row in (alone, two)]
        ratios = [of_two / of_one for of_one, of_two in zip(*rates, strict=True)]
        assert two["efficiency"] == pytest.approx(quantiles(ratios)["median"])
        assert 0 < two["communication_share"] < 1


def test_bytes_counted_are_those_computed(written: tuple[dict[str, Any], str]) -> None:
    """And both are what the sizes of the network and of the views say."""
    config = ScalingConfig(setting=TINY)
    result = config.result("weak", 2)
    method = build_method(result.backbone, result.method, seed=0)
    num_gradients = sum(weight.numel() for weight in method.query_encoder.parameters())
    num_statistics = sum(b.numel() for b in method.query_encoder.buffers() if b.is_floating_point())
    for row in written[0]["rows"]:
        assert row["bytes_counted"] == row["bytes_computed"]
        assert row["calls_counted"] == row["calls_computed"]
        if row["ranks"] == 1:
            assert row["bytes_counted"] == {}
            continue
        local = 9 if row["mode"] == "weak" else 5
        assert row["bytes_counted"] == {
            "all_reduce": 2 * num_gradients + 4 * num_statistics,
            "all_gather": 4 * 2 * 2 * local * result.method.projection_dim,
            "all_to_all": 2 * local * (16 * 16 * 3 + 13 * 8),
        }


def test_two_points_are_not_projected(written: tuple[dict[str, Any], str]) -> None:
    document, page = written
    assert document["projection"]["what"] == "a projection, not a measurement"
    assert "3 measured points are too few to fit 4 coefficients" in document["projection"]["refused"]
    assert "rows" not in document["projection"]
    assert "No projection: 3 measured points are too few" in page
    assert "it says nothing of GPUs and NCCL" in page
    assert f"| weak | 2 | 18 | {document['rows'][1]['images_per_s']:,.1f} [" in page


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"query_batchnorm": "sync", "key_batchnorm": "sync"},
        {"query_batchnorm": "sync", "key_batchnorm": "ema", "key_passes": "joint"},
        {"key_batchnorm": "shuffle", "key_passes": "joint"},
    ],
    ids=["sync", "sync-ema", "shuffle-joint"],
)
def test_volume_by_hand(changes: dict[str, Any], world_size: int) -> None:
    base = tiny_config().result
    result = replace(base, batch_size=10, micro_batches=2, method=replace(base.method, **changes))
    volume = communication_volume(result, SpeedConfig(precision="fp64"), world_size)
    if world_size == 1:
        assert (volume.calls, volume.bytes, volume.wire_bytes) == ({}, {}, 0)
        return
    encoder = build_method(result.backbone, result.method, seed=0).query_encoder
    gradients = 8 * sum(weight.numel() for weight in encoder.parameters())
    norms = [m.num_features for m in encoder.modules() if type(m).__name__ == "BatchNorm2d"]
    assert len(norms) == 20
    gathered = 8 * 3 * (2 * sum(norms) + len(norms))
    if changes["key_batchnorm"] == "shuffle":
        expected_calls = {"all_reduce": 1, "all_gather": 1, "all_to_all": 1}
        # two parts of five images: four, three and three of ten views each
        expected = {
            "all_reduce": gradients + 8 * 2 * sum(norms),
            "all_gather": 8 * 3 * 8 * 8,
            "all_to_all": 2 * 4 * (16 * 16 * 3 + 13 * 8),
        }
    else:
        passes = 2 + (4 if changes["key_batchnorm"] == "sync" else 0)
        expected_calls = {"all_reduce": 1 + 2 * 20, "all_gather": 1 + passes * 20}
        expected = {
            "all_reduce": gradients + 2 * 8 * 2 * sum(norms),
            "all_gather": 8 * 3 * 8 * 8 + passes * gathered,
        }
    assert volume.calls == expected_calls
    assert volume.bytes == expected
    ring = 2 * expected["all_reduce"] + expected["all_gather"] + expected.get("all_to_all", 0)
    assert volume.wire_bytes == pytest.approx(2 / 3 * ring)


class TestModel:
    @staticmethod
    def points(sizes: list[tuple[int, int]], times: tuple[float, float, float, float]) -> list[ScalingPoint]:
        fixed, per_image, latency, per_byte = times
        made = []
        for ranks, images in sizes:
            hops = {1: 0, 2: 1, 3: 2, 4: 2, 8: 3}[ranks]
            sent = 1e6 * 2 * (ranks - 1) / ranks
            step_ms = fixed + per_image * images + latency * 3 * hops + per_byte * sent
            made.append(
                ScalingPoint(
                    num_ranks=ranks, local_batch_size=images, num_collectives=3 * (ranks > 1), wire_bytes=sent,
                    step_ms=step_ms,
                )
            )  # fmt: skip
        return made

    BOTH = ((1, 64), (2, 64), (2, 32), (4, 64), (4, 16), (8, 8))

    def test_exact_points_give_their_coefficients_back(self) -> None:
        times = (5.0, 0.25, 0.04, 1e-5)
        model = fit_scaling_model(self.points(list(self.BOTH), times))
        assert (model.fixed_ms, model.per_image_ms, model.latency_ms, model.ms_per_byte) == pytest.approx(times)
        assert model.bandwidth_gb_per_s == pytest.approx(0.1)
        assert model.worst_error < 1e-9
        unseen = self.points([(8, 64)], times)[0]
        assert model.step_ms(replace(unseen, step_ms=None)) == pytest.approx(unseen.step_ms)

    def test_no_coefficient_is_negative(self) -> None:
        """Points that get faster with more bytes: the model says that bytes cost nothing, and how far it is off."""
        model = fit_scaling_model(self.points(list(self.BOTH), (5.0, 0.25, 0.04, -1e-6)))
        assert model.ms_per_byte == 0
        assert model.bandwidth_gb_per_s is None
        assert min(model.fixed_ms, model.per_image_ms or 0.0, model.latency_ms) >= 0
        assert 1e-4 < model.worst_error < 0.2

    def test_weak_points_alone(self) -> None:
        """The computation is then one number: three coefficients."""
        sizes = [(1, 64), (2, 64), (4, 64), (8, 64)]
        model = fit_scaling_model(self.points(sizes, (5.0, 0.25, 0.04, 1e-5)))
        assert model.per_image_ms is None
        assert (model.fixed_ms, model.latency_ms) == pytest.approx((5 + 16, 0.04))
        with pytest.raises(ValueError, match="3 measured points are too few to fit 3 coefficients; give more --ranks"):
            fit_scaling_model(self.points(sizes[:3], (5.0, 0.25, 0.04, 1e-5)))

    def test_points_that_tell_nothing_apart(self) -> None:
        with pytest.raises(ValueError, match="cannot tell latency, bandwidth and computation apart"):
            fit_scaling_model(self.points([(1, 64), (1, 32), (1, 16), (1, 8), (1, 4)], (5.0, 0.25, 0.04, 1e-5)))


class TestBadInput:
    def test_values(self) -> None:
        for changes, message in (
            ({"ranks": (2, 2)}, "--ranks 2 2 is not allowed"),
            ({"ranks": (0,)}, "--ranks 0 is not allowed"),
            ({"rounds": 1}, "rounds 1 is not allowed"),
            ({"project_to": (0,)}, "--project-to 0 is not allowed"),
            ({"limit_s": 0.0}, "limit_s 0.0 is not allowed"),
        ):
            with pytest.raises(ValueError, match=message):
                ScalingConfig(**changes)  # type: ignore[arg-type]

    def test_a_batch_that_cannot_be_shared(self) -> None:
        config = ScalingConfig(setting=TINY, speed=SpeedConfig(device="cpu"), ranks=(10,), mode="strong")
        with pytest.raises(ValueError, match="a global batch of 9 cannot be shared by 10 ranks"):
            bench_scaling(config)

    @pytest.mark.timeout(120)
    def test_a_rank_that_fails_ends_the_team(self) -> None:
        """The network of the second turn cannot be; no process is left."""
        result = ScalingConfig(setting=TINY).result("weak", 1)
        team = TeamConfig(
            speed=SpeedConfig(device="cpu", precision="fp64", compile="off"), steps=1, warmup_steps=1, threads=1,
            limit_s=60.0,
        )  # fmt: skip
        broken = replace(result, backbone=replace(result.backbone, width_multiplier=1e9))
        with RankTeam([TeamTurn(num_ranks=1, result=broken)], team) as ranks:
            process = ranks._ranks[0]._process
            with pytest.raises(RuntimeError, match="rank 0 failed"):
                ranks.turn()
        assert not process.is_alive()

    @pytest.mark.timeout(120)
    def test_a_turn_that_takes_too_long(self) -> None:
        """Less than what a process needs to start."""
        team = TeamConfig(speed=SpeedConfig(device="cpu"), steps=1, warmup_steps=1, threads=1, limit_s=0.1)
        turn = TeamTurn(num_ranks=2, result=ScalingConfig(setting=TINY).result("weak", 2))
        with RankTeam([turn], team) as ranks:
            processes = [rank._process for rank in ranks._ranks]
            with pytest.raises(RuntimeError, match=r"rank 0, rank 1 did not finish a turn in 0\.1 s"):
                ranks.turn()
        assert not any(process.is_alive() for process in processes)


def test_page_of_a_projection() -> None:
    document = {
        "method": "leoclr", "header": "tiny", "notes": [], "rounds": 2, "steps": 3, "rows": [],
        "projection": {
            "formula": "f", "points": 6, "left_out": ["strong, 64 ranks: too many"],
            "coefficients": {
                "fixed_ms": 5.0, "per_image_ms": None, "latency_ms": 0.04, "worst_error": 0.03,
                "bandwidth_gb_per_s": None,
            },
            "rows": [{"mode": "weak", "ranks": 64, "batch_size": 4096, "images_per_s": 1234.5, "step_ms": 3317.9}],
        },
    }  # fmt: skip
    page = scaling_markdown(document)
    assert "Projection, not measured, from 6 points" in page
    assert "| weak | 64 | 4096 | 1,234.5 | 3,317.9 |" in page
    assert "- left out: strong, 64 ranks: too many" in page
