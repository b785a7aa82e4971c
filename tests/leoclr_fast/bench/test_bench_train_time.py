"""`bench train-time` and `bench step` at a size that a CPU gets through in seconds: the whole path of both."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leoclr_fast.bench import train_time, turns
from leoclr_fast.bench.contestant import Contestant, OurMethod
from leoclr_fast.bench.feeds import open_feeds, training_images
from leoclr_fast.bench.projection import ProjectionConfig, project
from leoclr_fast.bench.setting import BenchSetting, departures_from_paper, setting_header
from leoclr_fast.bench.statistics import median_interval
from leoclr_fast.bench.step import WHOLE, StepBenchConfig, bench_step, step_markdown
from leoclr_fast.bench.stopwatch import time_calls_ms
from leoclr_fast.bench.tables import markdown_table
from leoclr_fast.bench.train_time import TrainTimeConfig, bench_train_time, step_time_ratio
from leoclr_fast.bench.train_time_report import plot_train_time, train_time_markdown
from leoclr_fast.bench.turns_config import TurnsConfig
from leoclr_fast.cli import run_command
from leoclr_fast.config import SpeedConfig
from leoclr_fast.machine.gpu_state import sharing_warnings
from leoclr_fast.method.flops import training_flops_per_image
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig
from pipelines.views import LEOCLR_VIEWS, MOCOV2_VIEWS

TINY = BenchSetting(recipe="leoclr_demo", batch_size=8, queue_size=32, image_size=16, width_multiplier=0.0625)
CPU = SpeedConfig(device="cpu")
SHORT = TurnsConfig(rounds=2, steps=2, lead_steps=1, warmup_steps=1)


@pytest.fixture(scope="module")
def document(tiny_data: Path) -> dict[str, Any]:
    config = TrainTimeConfig(
        setting=TINY,
        speed=CPU,
        turns=SHORT,
        peers=True,
        projection=ProjectionConfig(epochs=2, images=1000, gpus=4, price_per_gpu_hour=3.0),
    )
    return bench_train_time(config, tiny_data)


METHODS = ["leoclr", "mocov2", "published MoCo-v2 loop", "lightly MoCo-v2"]


def test_every_method_on_both_kinds_of_images(document: dict[str, Any]):
    pytest.importorskip("lightly")
    rows = document["rows"]
    assert [(row["method"], row["data"]) for row in rows] == [
        (method, data) for data in ("synthetic", "real") for method in METHODS
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(np.median([8000 / ms for ms in row["turns_step_ms"]]))
        assert row["step_ms"] == pytest.approx(np.median(row["turns_step_ms"]))
        assert row["images_per_s_q20"] <= row["images_per_s"] <= row["images_per_s_q80"]
        assert 0 <= row["data_wait_fraction"] <= 1
        assert (row["mfu"], row["peak_memory_gib"], row["energy_per_million_images_kwh"]) == (None, None, None)
    assert {row["loader"] for row in rows} == {"synthetic", "resident"}


def test_the_ratio_is_that_of_the_pairs(document: dict[str, Any]):
    for data in ("synthetic", "real"):
        times = {row["method"]: row["turns_step_ms"] for row in document["rows"] if row["data"] == data}
        pairs = [ours / theirs for ours, theirs in zip(times["leoclr"], times["mocov2"], strict=True)]
        assert document[f"ratio_{data}"] == median_interval(pairs)


def test_a_peer_half_as_fast_has_a_speedup_of_two():
    rows = [
        {"method": "mocov2", "data": "synthetic", "turns_step_ms": [10.0, 30.0, 20.0]},
        {"method": "slow", "data": "synthetic", "turns_step_ms": [20.0, 60.0, 40.0]},
    ]
    assert step_time_ratio(rows, "synthetic", "slow", "mocov2") == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert step_time_ratio(rows, "real", "slow", "mocov2") is None


def test_a_cpu_says_that_it_is_one_and_what_is_missing(document: dict[str, Any]):
    notes = " ".join(document["notes"])
    for words in ("without a bound", "no MFU", "no energy"):
        assert words in notes
    assert not document["paper_setting"]
    assert "not the paper setting" in document["header"]
    assert document["gpu"] is None


def test_page_and_plot(document: dict[str, Any], tmp_path: Path):
    page = train_time_markdown(document, "the command")
    assert document["header"] in page
    assert "Projection, not a measurement: 2 epochs of 1,000 images on 4" in page
    assert f"LeOCLR / MoCo-v2, real images: {document['ratio_real']['median']:.3f}" in page
    plot_train_time(document, tmp_path / "new" / "rates.svg")
    assert (tmp_path / "new" / "rates.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(ValueError, match=r"rates\.txt: give a name that ends in \.svg"):
        plot_train_time(document, tmp_path / "rates.txt")


def test_a_gpu_is_told_with_its_clock(document: dict[str, Any]):
    state = {
        "name": "NVIDIA H200",
        "driver": "580.1",
        "sm_clock_mhz": "1830",
        "max_sm_clock_mhz": "1980",
        "temperature_c": "55",
        "power_limit_w": "700.00",
    }
    page = train_time_markdown(document | {"gpu_after": state})
    assert "NVIDIA H200, driver 580.1, SM clock 1830 of 1980 MHz" in page


def test_energy_is_that_of_all_turns_or_unknown(document: dict[str, Any]):
    result, device = TINY.result("mocov2"), torch.device("cpu")
    entrant = turns.Prepared(contestant=_Recorder("a", MOCOV2_VIEWS, []), peak_memory_gib=None)

    def row(*joules: float | None) -> dict[str, Any]:
        taken = [turns.Turn(steps=10, seconds=1.0, data_wait_s=0.25, energy_j=energy) for energy in joules]
        return train_time._row(entrant, "synthetic", taken, result.batch_size, device, "fp32")

    # 3.6e6 J are a kWh: 160 images took 72 J, so a million take 450 kJ.
    assert row(36.0, 36.0)["energy_per_million_images_kwh"] == pytest.approx(0.125)
    assert row(36.0, None)["energy_per_million_images_kwh"] is None
    assert row(36.0, 36.0)["data_wait_fraction"] == 0.25
    assert row(36.0, 36.0)["images_per_s"] == 80


def test_the_projection_by_hand(document: dict[str, Any]):
    config = ProjectionConfig(epochs=10, images=3600, gpus=5, price_per_gpu_hour=2.0)
    projected = project(config, images_per_s=2.0, energy_per_image_j=100.0)
    assert projected == {"hours": 1.0, "gpu_hours": 5.0, "energy_kwh": 1.0, "cost": 10.0}
    bare = project(replace(config, price_per_gpu_hour=None), images_per_s=2.0, energy_per_image_j=None)
    assert (bare["energy_kwh"], bare["cost"]) == (None, None)
    row = document["projection"]["rows"][0]
    assert row["hours"] == pytest.approx(2000 / document["rows"][0]["images_per_s"] / 3600 / 4)
    with pytest.raises(ValueError, match="0 gpus"):
        ProjectionConfig(gpus=0)


def test_the_command_prints_the_document_last(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    flags = (
        "bench train-time --recipe leoclr_demo --batch-size 8 --queue-size 32 --image-size 16 --width-multiplier "
        f"0.0625 --device cpu --rounds 2 --steps 1 --lead-steps 0 --warmup-steps 1 --data {tiny_data} "
        f"--markdown {tmp_path}/page.md --plot {tmp_path}/plot.png --json"
    ).split()
    monkeypatch.setattr("sys.argv", ["leoclr-fast", *flags])
    assert run_command(flags) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["method"] for row in document["rows"]] == ["leoclr", "mocov2"] * 2
    assert set(document["ratio_real"]) == {"median", "low", "high"}
    page = (tmp_path / "page.md").read_text()
    assert "--data data " in page
    assert str(tiny_data) not in page
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_step_parts_and_whole():
    document = bench_step(StepBenchConfig(setting=TINY, speed=CPU, repeats=2, warmup=1))
    for method, num_keys in (("leoclr", 2), ("mocov2", 1)):
        rows = [row for row in document["rows"] if row["method"] == method]
        assert [row["part"] for row in rows] == [
            "augmentation",
            "moving average of the key encoder",
            f"key forward, {num_keys} views",
            "query forward and backward",
            "loss forward and backward",
            "optimizer",
            "metrics: gradient norm and similarities",
            "enqueue",
            WHOLE,
        ]
        assert sum(row["share"] for row in rows[:-1]) == pytest.approx(1)
        assert rows[-1]["images_per_s"] == pytest.approx(8000 / rows[-1]["ms"])
        assert all(row["ms"] > 0 for row in rows)
    assert document["header"] in step_markdown(document)


class _Recorder(Contestant):
    """Notes whose turn it is."""

    flops_per_image = 1

    def __init__(self, name: str, views: Any, log: list[str]) -> None:
        self.name, self.views, self._log = name, views, log

    def step(self, batch: CropBatch) -> None:
        assert batch.crops.shape[1] == len(self.views)
        self._log.append(self.name)


def test_turns_alternate_and_time_only_their_own_steps(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    contestants = [_Recorder("a", LEOCLR_VIEWS, log), _Recorder("b", MOCOV2_VIEWS, log)]
    result, device = TINY.result("leoclr"), torch.device("cpu")
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(clock)))
    config = TurnsConfig(rounds=3, steps=2, lead_steps=1, warmup_steps=2, max_s=1e9)
    with open_feeds(
        training_images(None, result), [LEOCLR_VIEWS, MOCOV2_VIEWS], result, LoaderConfig(name="synthetic"), device
    ) as (feeds, name):
        taken = turns.take_turns(contestants, feeds, device, config)
    assert name == "synthetic"
    assert "".join(log) == "aabb" + "aaabbb" + "bbbaaa" + "aaabbb"
    # A clock that moves half a second at each look: start, two looks for each step's data, the end.
    assert [turn.seconds for turn in taken[0]] == [2.5] * 3
    assert [turn.data_wait_s for turn in taken[0]] == [1.0] * 3
    assert taken[0][0].step_ms == 1250
    assert taken[1][0].energy_j is None


def test_no_new_round_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    contestant = _Recorder("a", MOCOV2_VIEWS, log)
    result, device, said = TINY.result("mocov2"), torch.device("cpu"), []
    config = TurnsConfig(rounds=50, steps=1, lead_steps=0, warmup_steps=1, max_s=1e-9)
    with open_feeds(training_images(None, result), [MOCOV2_VIEWS], result, LoaderConfig(name="synthetic"), device) as (
        feeds,
        _,
    ):
        (taken,) = turns.take_turns([contestant], feeds, device, config, said.append)
    assert len(taken) == 2
    assert "stopped after 2 of 50 rounds" in said[-1]


def test_both_methods_see_the_same_crops_of_the_same_images(tiny_data: Path):
    result, device = TINY.result("leoclr"), torch.device("cpu")
    split = training_images(tiny_data, result)
    with open_feeds(split, [LEOCLR_VIEWS, MOCOV2_VIEWS], result, LoaderConfig(), device) as (feeds, _):
        pairs = list(islice(zip(feeds[LEOCLR_VIEWS], feeds[MOCOV2_VIEWS], strict=True), 7))  # into the second epoch
    assert {theirs.epoch for _, theirs in pairs} == {0, 1}
    for ours, theirs in pairs:
        assert (ours.indices == theirs.indices).all()
        assert torch.equal(ours.crops[:, 1:], theirs.crops)


def test_our_contestant_is_the_step_of_pretrain():
    setting, device = TINY, torch.device("cpu")
    ours = OurMethod("leoclr", setting, CPU, device)
    before = [weight.clone() for weight in ours.training.method.query_encoder.parameters()]
    with open_feeds(
        training_images(None, setting.result("leoclr")),
        [LEOCLR_VIEWS],
        setting.result("leoclr"),
        LoaderConfig(name="synthetic"),
        device,
    ) as (feeds, _):
        ours.step(next(feeds[LEOCLR_VIEWS]))
    assert ours.training.step == 1
    assert int(ours.training.method.queue.pointer) == 8
    after = list(ours.training.method.query_encoder.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert ours.flops_per_image == training_flops_per_image(setting.result("leoclr"))


def test_the_default_setting_is_the_papers():
    for method in ("leoclr", "mocov2"):
        result = BenchSetting().result(method)  # type: ignore[arg-type]
        assert departures_from_paper(result) == []
        assert result.method.name == method
        assert (result.batch_size, result.method.key_batchnorm) == (256, "split")
    changed = BenchSetting(arch="resnet18", key_passes="joint").result("leoclr")
    assert departures_from_paper(changed) == ["arch resnet18 (not resnet50)", "key passes joint (not separate)"]
    header = setting_header(BenchSetting().result("leoclr"), CPU, torch.device("cpu"))
    assert header.endswith("[paper setting]")
    assert "CPU" in header


def test_a_peer_that_cannot_run_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Contestant:
        raise ImportError("its package is missing: pip install it")

    monkeypatch.setattr(train_time, "load_peers", lambda: {"broken": broken})
    config = TrainTimeConfig(setting=TINY, speed=CPU, turns=SHORT, peers=True)
    document = bench_train_time(config, None)
    assert [row["method"] for row in document["rows"]] == ["leoclr", "mocov2"]
    assert "broken did not run: its package is missing: pip install it" in document["notes"]
    assert document["ratio_real"] is None


def test_too_few_images_are_told_before_anything_is_timed(tiny_data: Path):
    said: list[str] = []
    with pytest.raises(ValueError, match="has 40 images to train on, fewer than one batch of 64"):
        bench_train_time(
            TrainTimeConfig(setting=replace(TINY, batch_size=64, queue_size=64), speed=CPU), tiny_data, said.append
        )
    assert not any("round" in line for line in said)


def test_synthetic_images_are_never_called_real(tiny_data: Path):
    speed = SpeedConfig(device="cpu", loader=LoaderConfig(name="synthetic"))
    with pytest.raises(ValueError, match="would never read the images"):
        bench_train_time(TrainTimeConfig(setting=TINY, speed=speed, turns=SHORT), tiny_data)


def test_peers_need_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(train_time.leoclr_fast, "__file__", str(tmp_path / "leoclr_fast" / "__init__.py"))
    with pytest.raises(ValueError, match="clone the repository"):
        train_time.load_peers()


def test_one_device_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun started 3 processes"):
        bench_train_time(TrainTimeConfig(setting=TINY, speed=CPU, turns=SHORT), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 1}, "rounds 1"),
        ({"steps": 0}, "steps 0"),
        ({"warmup_steps": 0}, "warmup_steps 0"),
        ({"max_s": 0}, "max_s 0"),
    ],
)
def test_too_little_to_measure(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TurnsConfig(**changes)


def test_shared_and_sliced_gpus_are_told():
    quiet = {"name": "NVIDIA H200", "mig": False, "memory_used_elsewhere_gib": 0.0, "utilization_percent": "0"}
    assert sharing_warnings(quiet) == []
    (mig,) = sharing_warnings(quiet | {"name": "NVIDIA A100 MIG 1g.10gb", "mig": True})
    assert "MIG slice" in mig
    shared, busy = sharing_warnings(quiet | {"memory_used_elsewhere_gib": 12.5, "utilization_percent": "97"})
    assert "12.5 GiB" in shared
    assert "97 % busy" in busy
    assert sharing_warnings(quiet | {"utilization_percent": None}) == []


def test_calls_are_timed_one_by_one():
    calls: list[int] = []
    times = time_calls_ms(lambda: calls.append(1), torch.device("cpu"), warmup=3, repeats=5)
    assert (len(calls), len(times)) == (8, 5)
    assert len(time_calls_ms(lambda: None, torch.device("cpu"), warmup=0, repeats=50, max_s=0.0)) == 2


def test_a_table():
    assert markdown_table(("a", "b"), [("x|y", "1")]) == "| a | b |\n|---|---:|\n| x\\|y | 1 |\n"
    with pytest.raises(ValueError, match="a row of 1 cells"):
        markdown_table(("a", "b"), [("x",)])
