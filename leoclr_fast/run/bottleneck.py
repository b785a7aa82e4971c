"""What a training waits for: its data, copies to the device, or nothing but its own arithmetic. One remedy for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DATA_BOUND, PARTLY_DATA_BOUND = 0.5, 0.1
"""Shares of the training time spent waiting for data, from which on a run is called so."""
COPY_BOUND = 0.1
"""Share of the synthetic rate that is lost, and that waiting for data does not explain, from which on it is."""

Kind = Literal["data-bound", "partly data-bound", "copy-bound", "compute-bound"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What bounds the speed, why, and what to do; no remedy where there is nothing to mend."""

    kind: Kind
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.reason})" + (f"; {self.remedy}" if self.remedy else "")


def find_bottleneck(
    data_wait_fraction: float,
    *,
    loader: str,
    on_cpu: bool,
    real_images_per_s: float | None = None,
    synthetic_images_per_s: float | None = None,
) -> Bottleneck | None:
    """From the share of the training time in which steps waited for data, and, where both were measured, from what the
    same training does with images that lie on the device. None where the wait is unknown (NaN).

    Copy-bound is what loses speed against synthetic images without waiting: the device itself is kept busy by copies,
    decoding and cropping. loader: a name of --loader; with another one the remedy is general.
    """
    wait = data_wait_fraction
    if not math.isfinite(wait):
        return None
    if wait >= PARTLY_DATA_BOUND:
        faster = f", so that loading could speed it up at most {1 / (1 - wait):.2f} times" if wait < 1 else ""
        return Bottleneck(
            kind="data-bound" if wait >= DATA_BOUND else "partly data-bound",
            reason=f"its steps waited for data {100 * wait:.0f} % of the time{faster}",
            remedy=_remedy(loader, on_cpu),
        )
    waited = f"its steps waited for data {100 * wait:.1f} % of the time"
    if real_images_per_s is not None and synthetic_images_per_s:
        lost = 1 - real_images_per_s / synthetic_images_per_s
        if lost - wait >= COPY_BOUND:
            return Bottleneck(
                kind="copy-bound",
                reason=f"{waited}, yet synthetic images would be {1 / (1 - lost):.2f} times as fast",
                remedy="share the cores: fewer --loader.workers"
                if on_cpu
                else "take --loader dali or nvjpeg: encoded bytes are smaller to copy than crops",
            )
    return Bottleneck(kind="compute-bound", reason=waited, remedy="")


def _remedy(loader: str, on_cpu: bool) -> str:
    if on_cpu:
        return (
            "the device is the CPU, so cropping and training share its cores: part of this wait is work that a GPU's "
            "host would do on the side"
        )
    from pipelines.factory import LOADERS, loader_class

    return loader_class(loader).remedy if loader in LOADERS else "raise --loader.workers to the number of cores"
