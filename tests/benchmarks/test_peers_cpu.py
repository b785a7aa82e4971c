"""The comparison with peers on a CPU, at a tiny size: what is compared, and that it is the same thing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers_cpu
from benchmarks.peers_cpu import OURS, TWO, LossSetting, compare_losses, compare_steps, sum_of_cross_entropies
from leoclr_fast.bench.setting import BenchSetting
from leoclr_fast.bench.statistics import median_interval

SMALL = LossSetting(B=12, K=96, D=16)


def test_two_cross_entropies_by_hand():
    query, first, second = torch.eye(2), torch.eye(2), torch.eye(2).flip(0)
    queue = torch.tensor([[-1.0, 0.0]])
    loss = sum_of_cross_entropies(query, (first, second), queue, temperature=1.0)
    # Rows: positives (1, 1) and (0, 0), the negative (-1, 0).
    parts = [[(1, -1), (1, 0)], [(0, -1), (0, 0)]]
    truth = sum(
        sum(float(torch.logsumexp(torch.tensor(row, dtype=torch.float64), 0)) - row[0] for row in part) / 2
        for part in parts
    )
    assert float(loss) == pytest.approx(truth, rel=1e-6)


def test_the_losses_are_compared_pair_by_pair():
    result = compare_losses(SMALL, rounds=3, calls=1, say=lambda _: None)
    times = result["times_ms"]
    assert [len(times[name]) for name in (OURS, TWO)] == [3, 3]
    assert result["speedups"][TWO] == median_interval(
        [two / one for one, two in zip(times[OURS], times[TWO], strict=True)]
    )
    assert "two positives" in result["header"]


def test_losses_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    exact = peers_cpu.info_nce
    monkeypatch.setattr(peers_cpu, "info_nce", lambda *arguments: 1.01 * exact(*arguments))
    with pytest.raises(AssertionError, match="not close"):
        compare_losses(SMALL, rounds=2, calls=1, say=lambda _: None)


def test_steps_of_all_peers():
    pytest.importorskip("lightly")
    setting = BenchSetting(recipe="mocov2_demo", batch_size=8, queue_size=32, image_size=16, width_multiplier=0.0625)
    result = compare_steps(setting, rounds=2, steps=1, say=lambda _: None)
    assert list(result["times_ms"]) == ["ours", "published MoCo-v2 loop", "lightly MoCo-v2"]
    assert set(result["speedups"]) == {"published MoCo-v2 loop", "lightly MoCo-v2"}


def test_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lightly")
    flags = "--parts loss --rounds 2 --calls 1 --loss-batch-size 12 --loss-queue-size 96"
    monkeypatch.setattr(sys, "argv", ["peers_cpu", *flags.split(), "--out", str(tmp_path)])
    peers_cpu.main()
    document = json.loads((tmp_path / "peers_cpu.json").read_text())
    assert document["loss"]["speedups"][TWO]["median"] > 0
    assert document["versions"]["lightly"]
    assert "| two cross entropies |" in (tmp_path / "peers_cpu.md").read_text()
    assert (tmp_path / "peers_cpu.log").read_text().startswith("$ python -m benchmarks.peers_cpu --parts loss")
