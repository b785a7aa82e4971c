"""`bench train-time` at a size that a CPU gets through in seconds: the whole path."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import leoclr_fast
from leoclr_fast.bench import rounds, train_time
from leoclr_fast.bench.config import BenchSetting, RoundsConfig, TrainTimeConfig
from leoclr_fast.bench.rounds import SYNTHETIC, OurMethod, TimedMethod, open_batches, training_images
from leoclr_fast.bench.setting import is_paper_setting, setting_header
from leoclr_fast.bench.statistics import ratio_interval
from leoclr_fast.bench.train_time import bench_train_time, train_time_markdown
from leoclr_fast.config import SpeedConfig
from leoclr_fast.method.flops import training_flops_per_image
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig
from pipelines.views import LEOCLR_VIEWS, MOCOV2_VIEWS

TINY = BenchSetting(recipe="leoclr_demo", batch_size=8, queue_size=32, image_size=16, width_multiplier=0.0625)
CPU, DEVICE = SpeedConfig(device="cpu", precision="fp32"), torch.device("cpu")
SHORT = RoundsConfig(rounds=2, steps=2, lead_steps=1, warmup_steps=1)
METHODS = ["leoclr", "mocov2", "published MoCo-v2 loop", "lightly MoCo-v2"]


@pytest.fixture(scope="module")
def document(tiny_data: Path) -> dict[str, Any]:
    return bench_train_time(TrainTimeConfig(peers=True), SHORT, TINY, CPU, tiny_data)


def test_every_method_on_both_kinds_of_images(document: dict[str, Any]):
    pytest.importorskip("lightly")
    rows = document["rows"]
    assert [(row["method"], row["data"]) for row in rows] == [
        (method, data) for data in ("synthetic", "real") for method in METHODS
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(np.median([8000 / ms for ms in row["rounds_step_ms"]]))
        assert row["step_ms"] == pytest.approx(np.median(row["rounds_step_ms"]))
        assert row["images_per_s_q20"] <= row["images_per_s"] <= row["images_per_s_q80"]
        assert 0 <= row["data_wait_fraction"] <= 1
        assert (row["mfu"], row["peak_memory_gib"], row["energy_per_million_images_kwh"]) == (None, None, None)
    assert {row["loader"] for row in rows} == {"synthetic", "resident"}


def test_ratios_and_speedups_are_those_of_the_pairs(document: dict[str, Any]):
    for data in ("synthetic", "real"):
        times = {row["method"]: row["rounds_step_ms"] for row in document["rows"] if row["data"] == data}
        assert document[f"ratio_{data}"] == ratio_interval(times["leoclr"], times["mocov2"])
        peer = METHODS[2]
        assert document["speedups"][data][peer] == ratio_interval(times[peer], times["mocov2"])


def test_page(document: dict[str, Any]):
    page = train_time_markdown(document, "the command")
    assert page.startswith(f"# LeOCLR next to MoCo-v2: training time\n\nSetting: {document['header']}.\n")
    assert f"step time LeOCLR / MoCo-v2, real images: {document['ratio_real']['median']:.3f}" in page
    assert "- our MoCo-v2 over published MoCo-v2 loop, synthetic images: " in page
    state = {
        "name": "NVIDIA H200", "driver": "580.1", "sm_clock_mhz": "1830", "max_sm_clock_mhz": "1980",
        "temperature_c": "55", "power_limit_w": "700.00",
    }  # fmt: skip
    on_gpu = train_time_markdown(document | {"gpu_after": state})
    assert "NVIDIA H200, driver 580.1, SM clock 1830 of 1980 MHz" in on_gpu


def test_energy_is_that_of_all_rounds_or_unknown():
    method = _Recorder("a", MOCOV2_VIEWS, [])

    def row(*joules: float | None) -> dict[str, Any]:
        timed = [rounds.TimedSteps(steps=10, seconds=1.0, data_wait_s=0.25, energy_j=energy) for energy in joules]
        return train_time._row(method, "synthetic", timed, 8, DEVICE, "fp32")

    # 3.6e6 J are a kWh: 160 images took 72 J, so a million take 450 kJ.
    assert row(36.0, 36.0)["energy_per_million_images_kwh"] == pytest.approx(0.125)
    assert row(36.0, None)["energy_per_million_images_kwh"] is None
    assert row(36.0, 36.0)["data_wait_fraction"] == 0.25
    assert row(36.0, 36.0)["images_per_s"] == 80


class _Recorder(TimedMethod):
    """Notes each of its steps."""

    flops_per_image = 1

    def __init__(self, name: str, views: Any, log: list[str]) -> None:
        self.name, self.views, self._log = name, views, log

    def step(self, batch: CropBatch) -> None:
        assert batch.crops.shape[1] == len(self.views)
        self._log.append(self.name)


def test_methods_alternate_and_only_their_own_steps_are_timed(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    methods = [_Recorder("a", LEOCLR_VIEWS, log), _Recorder("b", MOCOV2_VIEWS, log)]
    result = TINY.result("leoclr")
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: float(next(clock)))
    config = RoundsConfig(rounds=3, steps=2, lead_steps=1, warmup_steps=2, max_s=1e8)
    recipes = [LEOCLR_VIEWS, MOCOV2_VIEWS]
    with open_batches(training_images(None, result), recipes, result, SYNTHETIC, DEVICE) as (batches, name):
        timed = rounds.train_interleaved(methods, batches, DEVICE, config)
    assert name == "synthetic"
    assert "".join(log) == "aabb" + "aaabbb" + "bbbaaa" + "aaabbb"
    # A clock that moves half a second at each look: start, two looks for each step's data, the end.
    assert [own.seconds for own in timed[0]] == [2.5] * 3
    assert [own.data_wait_s for own in timed[0]] == [1.0] * 3
    assert timed[0][0].step_ms == 1250
    assert timed[1][0].energy_j is None


def test_both_methods_see_the_same_crops_of_the_same_images(tiny_data: Path):
    result = TINY.result("leoclr")
    split = training_images(tiny_data, result)
    with open_batches(split, [LEOCLR_VIEWS, MOCOV2_VIEWS], result, LoaderConfig(), DEVICE) as (batches, _):
        pairs = list(islice(zip(batches[LEOCLR_VIEWS], batches[MOCOV2_VIEWS], strict=True), 7))  # into the second epoch
    assert {theirs.epoch for _, theirs in pairs} == {0, 1}
    for ours, theirs in pairs:
        assert (ours.indices == theirs.indices).all()
        assert torch.equal(ours.crops[:, 1:], theirs.crops)


def test_our_method_is_the_step_of_pretrain():
    ours, result = OurMethod("leoclr", TINY, CPU, DEVICE), TINY.result("leoclr")
    before = [weight.clone() for weight in ours.training.method.query_encoder.parameters()]
    with open_batches(training_images(None, result), [LEOCLR_VIEWS], result, SYNTHETIC, DEVICE) as (batches, _):
        ours.step(next(batches[LEOCLR_VIEWS]))
    assert ours.training.step == 1
    assert int(ours.training.method.queue.pointer) == 8
    after = list(ours.training.method.query_encoder.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert ours.flops_per_image == training_flops_per_image(result)


def test_the_default_setting_is_the_papers():
    for method in ("leoclr", "mocov2"):
        result = BenchSetting().result(method)  # type: ignore[arg-type]
        assert is_paper_setting(result)
        assert result.method.name == method
        batchnorms = result.method.key_batchnorm, result.method.query_batchnorm
        assert (result.batch_size, *batchnorms) == (256, "shuffle", "split")
    changed = BenchSetting(key_passes="joint").result("leoclr")
    assert setting_header(changed, CPU, DEVICE).endswith("[not the paper's setting]")
    header = setting_header(BenchSetting().result("leoclr"), CPU, DEVICE)
    assert header.endswith("[the paper's setting]")
    assert "key batch-norm shuffle in groups of 32, query batch-norm split in groups of 32" in header
    assert "CPU" in header


def test_a_peer_that_cannot_run_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    class Broken(_Recorder):
        views, peer_of = MOCOV2_VIEWS, "mocov2"

        def __init__(self, *_: Any) -> None:
            raise ImportError("its package is missing: pip install it")

    monkeypatch.setattr("benchmarks.baselines.peers.PEERS", {"broken": Broken})
    document = bench_train_time(TrainTimeConfig(peers=True), SHORT, TINY, CPU)
    assert [row["method"] for row in document["rows"]] == ["leoclr", "mocov2"]
    assert "broken did not run: its package is missing: pip install it" in document["notes"]
    assert (document["ratio_real"], document["speedups"]) == (None, {"synthetic": {"broken": None}})


def test_mistakes_are_told_before_anything_is_timed(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    large = replace(TINY, batch_size=64, queue_size=64)
    with pytest.raises(ValueError, match="has 40 images to train on, fewer than one batch of 64"):
        bench_train_time(TrainTimeConfig(), SHORT, large, CPU, tiny_data)
    synthetic = SpeedConfig(device="cpu", loader=LoaderConfig(name="synthetic"))
    with pytest.raises(ValueError, match="would never read the images"):
        bench_train_time(TrainTimeConfig(), SHORT, TINY, synthetic, tiny_data)
    monkeypatch.setattr(leoclr_fast, "__file__", str(tmp_path / "leoclr_fast" / "__init__.py"))
    with pytest.raises(ValueError, match="clone the repository"):
        bench_train_time(TrainTimeConfig(peers=True), SHORT, TINY, CPU)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun started 3 processes"):
        bench_train_time(TrainTimeConfig(), SHORT, TINY, CPU)
