"""The parts of a step, at a size that a CPU gets through in seconds."""

from __future__ import annotations

import pytest

from benchmarks.step import WHOLE, StepBenchConfig, bench_step, step_markdown
from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.config import SpeedConfig

TINY = BenchSetting(recipe="leoclr_demo", batch_size=8, queue_size=32, image_size=16, width_multiplier=0.0625)
CPU = SpeedConfig(device="cpu", precision="fp32")


def test_step_parts_and_whole() -> None:
    document = bench_step(StepBenchConfig(repeats=2, warmup=1), TINY, CPU)
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
