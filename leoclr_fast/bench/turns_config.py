"""How long contestants train in turns."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnsConfig:
    """How long is measured."""

    rounds: int = 9
    """Every contestant has one turn in each; the order is reversed from round to round."""
    steps: int = 20
    """Timed steps of a turn."""
    lead_steps: int = 3
    """Steps before them, not timed: they use up what the loader had ready."""
    warmup_steps: int = 5
    """Steps of each contestant before the first round."""
    max_s: float = 600.0
    """No new round begins after so many seconds, preparation included; two are always run."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", LEAST_ROUNDS), ("steps", 1), ("lead_steps", 0), ("warmup_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is not allowed: give at least {least}")
        if not self.max_s > 0:
            raise ValueError(f"max_s {self.max_s} is not allowed: give a positive number of seconds")
