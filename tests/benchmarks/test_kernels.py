"""The loss and the augmentation timed on a CPU, and what they are timed with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.calls import interleaved_ms
from benchmarks.kernels import (
    CROSS_ENTROPIES,
    AugmentBenchConfig,
    LossBenchConfig,
    augment_markdown,
    bench_augment,
    bench_loss,
    loss_markdown,
    timed_rows,
)
from leoclr_fast.bench.timing import interleaved

CPU = torch.device("cpu")
LOSS = LossBenchConfig(batch_size=5, queue_size=37, dim=8, rounds=3, device="cpu")


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take half a minute."""
    monkeypatch.setattr(kernels, "what_compiling_lacks", lambda device_type: "a compiler")


class TestTiming:
    def test_the_order_rotates_and_two_rounds_are_not_counted(self) -> None:
        called: list[str] = []
        calls = {name: lambda name=name: called.append(name) for name in "abc"}
        times = interleaved_ms(calls, 3, CPU)
        assert "".join(called) == "bca" + "cab" + "abc" + "bca" + "cab"
        assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
        assert interleaved_ms({}, 3, CPU) == {}

    def test_calls_before_a_timed_one_are_not_timed(self) -> None:
        called: list[int] = []
        assert len(interleaved_ms({"a": lambda: called.append(1)}, 3, CPU, warmup=1, lead=2)["a"]) == 3
        assert len(called) == 4 * 3

    def test_no_round_begins_when_the_time_is_over(self) -> None:
        said: list[str] = []
        assert list(interleaved("ab", 9, max_s=0.0, say=said.append)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
        assert said == ["stopped after 2 of 9 rounds: 0 s have gone"]

    def test_what_fails_is_left_out_but_not_what_the_others_are_compared_with(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What cannot be captured is still timed, and the page says why one figure is missing."""

        def fails(*_: object) -> int:
            raise RuntimeError("no such kernel\nand more")

        def rows(calls: dict[str, Any], left_out: dict[str, str], *graphs: str) -> list[dict[str, Any]]:
            return timed_rows(calls, lambda result: {"error": result}, left_out, rounds=1, device=CPU, graphs=graphs)

        left_out = {"three": "why"}
        (row,) = rows({"one": lambda: 1.0, "two": fails}, left_out)
        assert (row["impl"], row["error"], row["graph_ms"]) == ("one", 1.0, None)
        assert left_out == {"three": "why", "two": "no such kernel"}
        with pytest.raises(RuntimeError, match="no such kernel"):
            rows({"one": fails}, {})
        monkeypatch.setattr(kernels, "captured", fails)
        (row,) = rows({"one": lambda: 1.0}, left_out := {}, "one")
        assert (row["ms"] > 0, row["graph_ms"], left_out) == (True, None, {"one, captured": "no such kernel"})
        monkeypatch.setattr(kernels, "captured", lambda call: call)
        (row,) = rows({"one": lambda: 1.0}, {}, "one")
        assert row["graph_ms"] > 0


class TestLoss:
    def test_rows(self) -> None:
        document = bench_loss(LOSS)
        first, second = document["rows"]
        assert (first["impl"], second["impl"]) == (CROSS_ENTROPIES, "eager")
        assert document["left_out"] == {"triton": "it needs a CUDA device", "compiled": "it lacks a compiler"}
        assert first["speedup"] == first["speedup_low"] == first["speedup_high"] == 1
        for row in (first, second):
            assert 0 < row["ms_q20"] <= row["ms"] <= row["ms_q80"]
            assert row["graph_ms"] is None
            assert row["loss_error"] < 1e-6
            assert row["gradient_error"] < 1e-6
        assert document["logits_mib"] == 5 * 37 * 4 / 2**20
        assert document["queue_mib"] == 37 * 8 * 4 / 2**20
        page = loss_markdown(document, "the command")
        assert "| cross entropies |" in page
        assert "- triton: left out, since it needs a CUDA device." in page

    def test_more_queries_than_the_truth_takes_at_once(self) -> None:
        document = bench_loss(replace(LOSS, batch_size=131, precision="bf16", positives=1, rounds=1))
        assert all(row["loss_error"] < 3e-3 and row["gradient_error"] < 2e-2 for row in document["rows"])


def test_augmentation_is_checked_against_float64() -> None:
    document = bench_augment(AugmentBenchConfig(batch_size=3, image_size=16, precision="fp32", device="cpu", rounds=1))
    assert [row["impl"] for row in document["rows"]] == ["torch", "numba"]
    assert all(row["error"] < 2e-5 for row in document["rows"])
    assert "- triton: left out, since it needs a CUDA device." in augment_markdown(document)
    assert document["views"] == 3
    assert document["crops_mib"] == 9 * 16 * 16 * 3 / 2**20
