"""What a GPU like the H200 should reach, and what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leoclr_fast.bench.tables import markdown_table

Results = dict[str, Any]
"""Section -> its result, or as much of it as was found before it was stopped."""


class NotJudgedError(Exception):
    """What a section found does not answer a target; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A claim with a bound. `value` raises KeyError or TypeError where the sections do not say, NotJudgedError where
    what they say is no answer.
    """

    claim: str
    bound: float
    at_most: bool
    value: Callable[[Results], float]


def judge(results: Results, *, tiny: bool) -> list[dict[str, Any]]:
    """Each target with what was reached and whether that is enough; None and a reason where it cannot be judged.

    Only a GPU at the paper setting is judged.
    """
    machine = results.get("machine", {})
    why_not = "the sizes were tiny" if tiny else "no GPU" if machine.get("gpu") is None else None
    verdicts = []
    for target in TARGETS:
        row: dict[str, Any] = {"claim": target.claim, "bound": target.bound, "reached": None, "met": None}
        try:
            row["reached"] = None if why_not else target.value(results)
            row["why_not"] = why_not
        except NotJudgedError as error:
            row["why_not"] = str(error)
        except (KeyError, TypeError, IndexError, StopIteration):
            row["why_not"] = "its section has no result"
        if row["reached"] is not None:
            row["met"] = row["reached"] <= target.bound if target.at_most else row["reached"] >= target.bound
        verdicts.append(row)
    return verdicts


def targets_markdown(verdicts: list[dict[str, Any]]) -> str:
    """The verdicts as a table."""
    return markdown_table(
        ("target (for a GPU like the H200, paper setting)", "reached", "verdict"),
        [
            (
                row["claim"],
                "–" if row["reached"] is None else f"{row['reached']:,.4g}",
                f"not judged: {row['why_not']}" if row["met"] is None else "met" if row["met"] else "**missed**",
            )
            for row in verdicts
        ],
    )


_VIEW_SIDE = 224


def _rate(results: Results, method: str) -> float:
    rows = results["train-time"]["rows"]
    return next(float(row["images_per_s"]) for row in rows if row["method"] == method and row["data"] == "synthetic")


def _failed_tests(results: Results) -> float:
    tests = results["tests"]
    unfinished = [file["file"] for file in tests["files"] if file["status"] != "finished"]
    if not tests["failed"] and unfinished:
        raise NotJudgedError(f"not run to the end: {', '.join(unfinished)}")
    if not tests["failed"] and not tests["passed"]:
        raise NotJudgedError("no test ran")
    return float(tests["failed"])


def _real_over_synthetic(results: Results) -> float:
    """Of LeOCLR; images smaller than a view, or no JPEGs, would flatter it or not be decoded on the device."""
    loaders = results["loaders"]
    ratio = float(loaders["real_over_synthetic"]["leoclr"])
    if loaders["jpeg_fraction"] < 1:
        raise NotJudgedError("not all images were JPEGs")
    if loaders["median_shorter_side"] < _VIEW_SIDE:
        raise NotJudgedError(f"the images were smaller than a view of {_VIEW_SIDE} pixels: give --photographs")
    return ratio


def _loaders_too_far_off(results: Results) -> float:
    if not results["loaders"]["parity"]:
        raise NotJudgedError("no loader could be compared")
    return float(results["loaders"]["too_far_off"])


def _augmentation_share(results: Results) -> float:
    rows = [row for row in results["step"]["bf16"]["rows"] if row["method"] == "leoclr"]
    times = {row["part"]: row["ms"] for row in rows}
    return float(times["augmentation"] / times["whole step"])


def _loss_row(results: Results, impl: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = results["loss"]["fp32"]["rows"]
    return next(row for row in rows if row["impl"] == impl)


def _loss_speedup(results: Results) -> float:
    """Over the faster of eager and compiled torch, as the GPU alone runs them."""
    ours = _loss_row(results, "triton")["graph_ms"]
    return float(min(_loss_row(results, impl)["graph_ms"] for impl in ("eager", "compiled")) / ours)


TARGETS = (
    Target(
        claim="step time LeOCLR / MoCo-v2, synthetic images: at most 1.28",
        bound=1.28,
        at_most=True,
        value=lambda results: results["train-time"]["ratio_synthetic"]["median"],
    ),
    Target(
        claim="LeOCLR, synthetic images: at least 3,000 images/s",
        bound=3000,
        at_most=False,
        value=lambda results: _rate(results, "leoclr"),
    ),
    Target(
        claim="our MoCo-v2 over the published loop: at least 2.5 times as fast",
        bound=2.5,
        at_most=False,
        value=lambda results: results["train-time"]["speedups"]["synthetic"]["published MoCo-v2 loop"]["median"],
    ),
    Target(
        claim="augmentation, alone, over the whole LeOCLR step: at most 0.03",
        bound=0.03,
        at_most=True,
        value=_augmentation_share,
    ),
    Target(
        claim="loss kernel, fp32, over the faster of eager and compiled torch: faster",
        bound=1.0,
        at_most=False,
        value=_loss_speedup,
    ),
    Target(
        claim="loss kernel, peak extra memory: at most 20 MiB",
        bound=20.0,
        at_most=True,
        value=lambda results: _loss_row(results, "triton")["peak_extra_mib"],
    ),
    Target(
        claim="kernels too far from the float64 truth, or that did not run: none",
        bound=0,
        at_most=True,
        value=lambda results: results["parity"]["too_far_off"] + results["parity"]["kernels_that_did_not_run"],
    ),
    Target(
        claim="LeOCLR, step time with real images over synthetic ones: at most 1.03",
        bound=1.03,
        at_most=True,
        value=_real_over_synthetic,
    ),
    Target(
        claim="loaders whose crops are too far from torchvision's: none",
        bound=0,
        at_most=True,
        value=_loaders_too_far_off,
    ),
    Target(
        claim="GPU tests that fail (no host synchronisation is among them): none",
        bound=0,
        at_most=True,
        value=_failed_tests,
    ),
)
