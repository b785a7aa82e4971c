"""What a check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["ok", "warning", "failed", "not applicable"]

_SEVERITY: tuple[Status, ...] = ("ok", "warning", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer of one check, in words."""

    status: Status
    found: str
    """With units."""
    remedy: str | None = None
    """One sentence with the command to type; there is one exactly if something is to be mended."""

    def __post_init__(self) -> None:
        assert self.status in get_args(Status), self.status
        assert (self.remedy is not None) == (self.status in ("warning", "failed")), self


@dataclass(frozen=True, slots=True)
class Trouble:
    """One of the things that a check may find."""

    status: Literal["warning", "failed"]
    what: str
    remedy: str


def ok(found: str) -> Finding:
    """Nothing to do."""
    return Finding(status="ok", found=found)


def warning(found: str, remedy: str) -> Finding:
    """It works, but slower or less safely than it could."""
    return Finding(status="warning", found=found, remedy=remedy)


def failed(found: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(status="failed", found=found, remedy=remedy)


def not_applicable(found: str) -> Finding:
    """There is nothing to check here, and why."""
    return Finding(status="not applicable", found=found)


def judged(found: str, troubles: Sequence[Trouble]) -> Finding:
    """A finding as bad as the worst of its troubles, with the remedies of all of them."""
    if not troubles:
        return ok(found)
    worst = max((trouble.status for trouble in troubles), key=_SEVERITY.index)
    words = [part for part in (found, *(trouble.what for trouble in troubles)) if part]
    remedies = dict.fromkeys(trouble.remedy for trouble in troubles)
    return Finding(status=worst, found="; ".join(words), remedy=" ".join(remedies))
