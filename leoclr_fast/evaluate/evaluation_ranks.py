"""The ranks of an evaluation under torchrun."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from leoclr_fast.ranks.collectives import Ranks
from leoclr_fast.ranks.process_group import Rendezvous, process_group
from leoclr_fast.ranks.watchdog import WatchdogLimits, watched

_LIMITS = WatchdogLimits(silence_s=45.0, step_s=math.inf, phase_s=math.inf)


@contextmanager
def evaluation_ranks(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """As `process_group`; a rank that dies or stops ends the evaluation on all others, which say which one it was."""
    with (
        process_group(device) as (ranks, chosen),
        watched(Rendezvous.of_environment(), _LIMITS) as watchdog,
        watchdog.phase("evaluation"),
    ):
        yield ranks, chosen
        ranks.barrier()  # whoever left before the others would seem to have died
