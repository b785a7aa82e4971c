"""The ranks of an evaluation under torchrun."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import Rendezvous, process_group
from leoclr_fast.distributed.watchdog import WatchdogLimits, watched
from leoclr_fast.evaluate.pace import Pace

_LIMITS = WatchdogLimits(silence_s=45.0, step_s=math.inf, phase_s=7200.0)
"""Steps have their limit from `Pace`. What else a rank does at a stretch can be to unpack an archive: two hours."""


@contextmanager
def evaluation_ranks(device: str) -> Iterator[tuple[Ranks, torch.device, Pace]]:
    """As `process_group`, and the pace that all batches are to be taken at.

    A rank that dies, stops or hangs ends the evaluation on all others, which say which one it was.
    """
    with (
        process_group(device) as (ranks, chosen),
        watched(Rendezvous.of_environment(), _LIMITS) as watchdog,
        watchdog.phase("evaluation"),
    ):
        yield ranks, chosen, Pace(watchdog)
        ranks.barrier()  # whoever left before the others would seem to have died
