"""bench loss and bench augment on a CPU, and what they measure with."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from leoclr_fast.bench import augment as augment_module
from leoclr_fast.bench import loss as loss_module
from leoclr_fast.bench.device_timing import first_results, interleaved_ms, peak_extra_mib
from leoclr_fast.bench.loss import CROSS_ENTROPIES, bench_loss, cross_entropies
from leoclr_fast.cli import run_command
from tests.leoclr_fast.losses.test_info_nce import cross_entropies as published_form
from tests.leoclr_fast.losses.test_info_nce import unit_vectors

CPU = torch.device("cpu")
LOSS = {"batch_size": 5, "queue_size": 37, "dim": 8, "positives": 2, "temperature": 0.2, "precision": "fp32"}


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take half a minute."""
    for module in (loss_module, augment_module):
        monkeypatch.setattr(module, "what_compiling_lacks", lambda device_type: "a compiler")


class TestTiming:
    def test_the_order_rotates_and_two_rounds_are_not_counted(self) -> None:
        called: list[str] = []
        calls = {name: lambda name=name: called.append(name) for name in "abc"}
        times = interleaved_ms(calls, 3, CPU)
        assert "".join(called) == "bca" + "cab" + "abc" + "bca" + "cab"
        assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
        assert interleaved_ms({}, 3, CPU) == {}

    def test_milliseconds(self) -> None:
        (taken,) = interleaved_ms({"sleep": lambda: time.sleep(0.05)}, 1, CPU)["sleep"]
        assert 50 <= taken < 5000

    def test_peak_memory_of_a_cpu(self) -> None:
        nothing, something = (
            peak_extra_mib(lambda mib=mib: torch.ones(mib, 2**20, dtype=torch.uint8), CPU) for mib in (1, 96)
        )
        if nothing is None:
            pytest.skip("this system does not tell the peak of a process's memory")
        assert nothing < 20
        assert something == pytest.approx(96, abs=10)

    def test_what_fails_is_left_out_but_not_what_is_needed(self) -> None:
        def fails() -> int:
            raise RuntimeError("no such kernel\nand more")

        calls, left_out = {"one": lambda: 1, "two": fails}, {"three": "why"}
        assert first_results(calls, "one", left_out) == {"one": 1}
        assert list(calls) == ["one"]
        assert left_out == {"three": "why", "two": "no such kernel"}
        with pytest.raises(RuntimeError, match="no such kernel"):
            first_results({"one": fails}, "one", {})


class TestLoss:
    def test_the_contestant_is_the_published_form(self) -> None:
        query, queue, *keys = (unit_vectors(rows, 8, seed) for seed, rows in enumerate((5, 37, 5, 5)))
        theirs, truth = (form(query, keys, queue, 0.2) for form in (cross_entropies, published_form))
        torch.testing.assert_close(theirs, truth, rtol=1e-14, atol=0)

    def test_rows(self) -> None:
        document = bench_loss(**LOSS, device=CPU, rounds=3)
        first, second = document["rows"]
        assert (first["impl"], second["impl"]) == (CROSS_ENTROPIES, "eager")
        assert document["left_out"] == {"triton": "it needs a CUDA device", "compiled": "it lacks a compiler"}
        assert first["speedup"] == first["speedup_low"] == first["speedup_high"] == 1
        for row in (first, second):
            assert 0 < row["q20_ms"] <= row["forward_backward_ms"] <= row["q80_ms"]
            assert row["graph_ms"] is None
            assert row["loss_error"] < 1e-6
            assert row["gradient_error"] < 1e-6
        assert document["logits_mib"] == 5 * 37 * 4 / 2**20
        assert document["queue_mib"] == 37 * 8 * 4 / 2**20

    def test_more_queries_than_the_truth_takes_at_once(self) -> None:
        document = bench_loss(**(LOSS | {"batch_size": 131, "precision": "bf16", "positives": 1}), device=CPU, rounds=1)
        assert all(row["loss_error"] < 3e-3 and row["gradient_error"] < 2e-2 for row in document["rows"])

    @pytest.mark.parametrize("flag", ["batch-size", "queue-size", "dim", "positives", "rounds"])
    def test_numbers_that_are_not_allowed(self, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["bench", "loss", f"--{flag}", "0"]) == 1
        assert "0 is not allowed: give at least 1" in capsys.readouterr().err


def test_an_augmentation_that_cannot_be_captured_is_still_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other times stay, and the page says why one is missing."""

    def fails(_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(augment_module, "captured", fails)
    calls, left_out = {"triton": lambda: torch.ones(1)}, {}
    assert augment_module._graph_ms("triton", calls, 1, CPU, left_out) is None
    assert left_out == {"triton, captured": "operation not permitted when stream is capturing"}
    monkeypatch.setattr(augment_module, "captured", lambda call: call)
    assert augment_module._graph_ms("triton", calls, 1, CPU, left_out) > 0
    assert augment_module._graph_ms("compiled", calls, 1, CPU, left_out) is None


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        (
            ["loss", "--batch-size", "4", "--queue-size", "16", "--dim", "8"],
            {"impl", "forward_backward_ms", "peak_extra_mib", "speedup", "loss_error", "gradient_error"},
        ),
        (
            ["augment", "--batch-size", "2", "--image-size", "16", "--method", "mocov2"],
            {"impl", "ms", "images_per_s", "peak_extra_mib", "speedup", "error"},
        ),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_the_command_lines(
    command: list[str], columns: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    options = ["--rounds", "1", "--device", "cpu", "--markdown", str(page), "--json"]
    assert run_command(["bench", *command, *options]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert all(columns <= row.keys() for row in document["rows"])
    assert document["environment"]["device"] == "cpu"
    written = page.read_text()
    assert written.strip() in printed
    assert all(f"| {row['impl']} |" in written for row in document["rows"])
    assert "- triton: left out, since it needs a CUDA device." in written


def test_augmentation_is_checked_against_float64() -> None:
    document = augment_module.bench_augment(
        method="leoclr", batch_size=3, image_size=16, precision="fp32", device=CPU, rounds=1
    )
    assert [row["impl"] for row in document["rows"]] == ["torch", "numba"]
    assert all(row["error"] < 2e-5 for row in document["rows"])
    assert document["views"] == 3
    assert document["crops_mib"] == 9 * 16 * 16 * 3 / 2**20


@pytest.mark.parametrize(
    ("change", "message"), [(("--image-size", "1"), "at least 2 pixels"), (("--rounds", "0"), "at least 1")]
)
def test_augmentations_that_are_not_allowed(
    change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["bench", "augment", "--batch-size", "1", *change]) == 1
    assert message in capsys.readouterr().err
