"""A sign of life: what a rank tells the others once a second, and how long they have not heard anything new."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

import leoclr_fast
from leoclr_fast.distributed import step_agreement

_OURS = Path(leoclr_fast.__file__).parents[1]
_COLLECTIVES = str(Path(dist.__file__).parent)
_WAITING = (
    _COLLECTIVES,
    str(Path(dist.__file__).parents[1] / "cuda" / "streams.py"),
    str(Path(step_agreement.__file__)),
)
"""Where a main thread is that waits for other ranks, or for what they compute together on GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a rank is doing."""

    number: int
    step: int
    """Finished steps."""
    phase: str
    overdue_s: float = 0.0
    """How long its main thread has made no progress, once that is longer than the phase allows; else 0."""
    waits: bool = False
    """Whether its main thread waits for other ranks."""
    place: str = ""
    """Where its main thread is, once it is slow."""
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Heartbeat:
        return cls(**json.loads(text))

    def told(self, rank: int) -> str:
        """Who it is of, and what it was doing."""
        doing = f" at {self.place}" if self.place else ""
        return f"rank {rank} on {self.host} (process {self.process}), last step {self.step}, in {self.phase}{doing}"


@dataclass(slots=True)
class Pulse:
    """The newest heartbeat of a rank, and when it was new by the reader's clock: those of other hosts do not matter."""

    beat: Heartbeat | None = None
    heard_s: float = field(default_factory=time.monotonic)

    def hear(self, beat: Heartbeat) -> None:
        if self.beat is None or beat.number != self.beat.number:
            self.beat, self.heard_s = beat, time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since something new was heard."""
        return time.monotonic() - self.heard_s


def in_collective(frames: Iterable[traceback.FrameSummary]) -> bool:
    """Whether one of the frames is torch's, where it talks to other ranks."""
    return any(entry.filename.startswith(_COLLECTIVES) for entry in frames)


def place_of_thread(thread_id: int) -> tuple[str, bool]:
    """Where a Python thread is, in our code if it is there, and whether it waits for other ranks."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return "", False
    frames = traceback.extract_stack(frame)
    waits = any(entry.filename.startswith(_WAITING) for entry in frames)
    ours = [entry for entry in frames if Path(entry.filename).is_relative_to(_OURS / "leoclr_fast")]
    ours += [entry for entry in frames if Path(entry.filename).is_relative_to(_OURS / "pipelines")]
    if not ours:
        return "", waits
    return f"{ours[-1].name}, {Path(ours[-1].filename).relative_to(_OURS)} line {ours[-1].lineno}", waits
