"""What a GPU like the H200 should reach, and what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from leoclr_fast.bench.page import table_of

Results = dict[str, Any]
"""Section -> its result, or as much of it as was found before it was stopped."""


class NoAnswerError(Exception):
    """What a section found does not answer a target; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A claim with a bound. `value` raises KeyError or TypeError where the sections do not say, NoAnswerError where
    what they say is no answer.
    """

    claim: str
    relation: Literal["<=", ">="]
    bound: float
    value: Callable[[Results], float]


def compare_with_targets(results: Results, *, tiny: bool) -> list[dict[str, Any]]:
    """Each target with what was reached and whether that is enough; None and a reason where it cannot be compared.

    Only a GPU at the paper setting is compared.
    """
    machine = results.get("machine", {})
    why_not = "the sizes were tiny" if tiny else "no GPU" if machine.get("gpu") is None else None
    rows = []
    for target in TARGETS:
        row: dict[str, Any] = {"claim": target.claim, "bound": target.bound, "reached": None, "met": None}
        try:
            row["reached"] = None if why_not else target.value(results)
            row["why_not"] = why_not
        except NoAnswerError as error:
            row["why_not"] = str(error)
        except (KeyError, TypeError, IndexError, StopIteration):
            row["why_not"] = "its section has no result"
        if row["reached"] is not None:
            row["met"] = row["reached"] <= target.bound if target.relation == "<=" else row["reached"] >= target.bound
        rows.append(row)
    return rows


def targets_markdown(rows: list[dict[str, Any]]) -> str:
    outcomes = {True: "met", False: "**missed**"}
    return table_of(
        rows,
        {
            "target (for a GPU like the H200, paper setting)": lambda row: row["claim"],
            "reached": lambda row: "–" if row["reached"] is None else f"{row['reached']:,.4g}",
            "outcome": lambda row: outcomes.get(row["met"], f"not compared: {row['why_not']}"),
        },
    )


_VIEW_SIDE = 224


def _failed_tests(results: Results) -> float:
    tests = results["tests"]
    unfinished = [file["file"] for file in tests["files"] if file["status"] != "finished"]
    if not tests["failed"] and unfinished:
        raise NoAnswerError(f"not run to the end: {', '.join(unfinished)}")
    if not tests["failed"] and not tests["passed"]:
        raise NoAnswerError("no test ran")
    return float(tests["failed"])


def _real_over_synthetic(results: Results) -> float:
    """Of LeOCLR; images smaller than a view, or no JPEGs, would flatter it or not be decoded on the device."""
    loaders = results["loaders"]
    ratio = float(loaders["real_over_synthetic"]["leoclr"])
    if loaders["jpeg_fraction"] < 1:
        raise NoAnswerError("not all images were JPEGs")
    if loaders["median_shorter_side"] < _VIEW_SIDE:
        raise NoAnswerError(f"the images were smaller than a view of {_VIEW_SIDE} pixels: give --photographs")
    return ratio


def _loaders_too_far_off(results: Results) -> float:
    if not results["decoders"]["parity"]:
        raise NoAnswerError("no loader could be compared")
    return float(results["decoders"]["too_far_off"])


def _loss_row(results: Results, impl: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = results["loss"]["fp32"]["rows"]
    return next(row for row in rows if row["impl"] == impl)


def _loss_speedup(results: Results) -> float:
    """Over the faster of eager and compiled torch, as the GPU alone runs them."""
    ours = _loss_row(results, "triton")["graph_ms"]
    return float(min(_loss_row(results, impl)["graph_ms"] for impl in ("eager", "compiled")) / ours)


def _rate(results: Results) -> float:
    rows = results["train-time"]["rows"]
    return next(float(row["images_per_s"]) for row in rows if row["method"] == "leoclr" and row["data"] == "synthetic")


def _over_the_published_loop(results: Results) -> float:
    return float(results["train-time"]["speedups"]["synthetic"]["published MoCo-v2 loop"]["median"])


TARGETS = (
    Target(
        "step time LeOCLR / MoCo-v2, synthetic images: at most 1.28",
        "<=",
        1.28,
        lambda results: results["train-time"]["ratio_synthetic"]["median"],
    ),
    Target("LeOCLR, synthetic images: at least 3,000 images/s", ">=", 3000, _rate),
    Target("our MoCo-v2 over the published loop: at least 2.5 times as fast", ">=", 2.5, _over_the_published_loop),
    Target(
        "augmentation, of the time of all kernels of a LeOCLR step as it runs: at most 0.03",
        "<=",
        0.03,
        lambda results: float(results["profile"]["shares"]["augmentation"]),
    ),
    Target("loss kernel, fp32, over the faster of eager and compiled torch: faster", ">=", 1.0, _loss_speedup),
    Target(
        "loss kernel, peak extra memory: at most 20 MiB",
        "<=",
        20.0,
        lambda results: _loss_row(results, "triton")["peak_extra_mib"],
    ),
    Target("LeOCLR, step time with real images over synthetic ones: at most 1.03", "<=", 1.03, _real_over_synthetic),
    Target("loaders whose crops are too far from torchvision's: none", "<=", 0, _loaders_too_far_off),
    Target("GPU tests that fail (no host synchronisation is among them): none", "<=", 0, _failed_tests),
)
