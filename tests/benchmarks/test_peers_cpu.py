"""The comparison with peers on a CPU, at a tiny size: its files, and what stands in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import LossBenchConfig
from benchmarks.peers_cpu import PeersBenchmark
from leoclr_fast.bench.config import BenchSetting, RoundsConfig


def test_both_parts_and_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lightly")
    monkeypatch.setattr(sys, "argv", ["peers_cpu", "--out", str(tmp_path)])
    monkeypatch.setattr("benchmarks.kernels.what_compiling_lacks", lambda device_type: "a compiler")
    PeersBenchmark(
        setting=BenchSetting(recipe="mocov2_demo", batch_size=8, queue_size=32, image_size=16, width_multiplier=0.0625),
        rounds=RoundsConfig(rounds=2, steps=1, lead_steps=0, warmup_steps=1),
        loss=LossBenchConfig(batch_size=12, queue_size=96, dim=16, rounds=2, device="cpu"),
        out=tmp_path,
    ).run()
    document = json.loads((tmp_path / "peers_cpu.json").read_text())
    peers = ["published MoCo-v2 loop", "lightly MoCo-v2"]
    assert [row["method"] for row in document["step"]["rows"]] == ["mocov2", *peers]
    assert list(document["step"]["speedups"]["synthetic"]) == peers
    assert [row["impl"] for row in document["loss"]["rows"]] == ["cross entropies", "eager"]
    page = (tmp_path / "peers_cpu.md").read_text()
    for words in ("| cross entropies |", f"our MoCo-v2 over {peers[0]}, synthetic images: ", "lightly "):
        assert words in page
    assert (tmp_path / "peers_cpu.log").read_text().startswith("$ python -m benchmarks.peers_cpu --out ")
