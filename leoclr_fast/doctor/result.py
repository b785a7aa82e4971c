"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "not applicable"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "failed", "not applicable")


@dataclass(slots=True)
class Result:
    """The answer of one check, in words. There is a remedy exactly if something is to be mended."""

    found: str
    """With units."""
    status: Status = "ok"
    remedy: str | None = None
    """What to do: sentences with the command to type."""

    def warn(self, what: str, remedy: str) -> None:
        """Add what works, but slower or less safely than it could."""
        self._add("warning", what, remedy)

    def fail(self, what: str, remedy: str) -> None:
        self._add("failed", what, remedy)

    def _add(self, status: Status, what: str, remedy: str) -> None:
        self.status = max(self.status, status, key=STATUSES.index)
        self.found = f"{self.found}; {what}" if self.found else what
        if remedy not in (self.remedy or ""):
            self.remedy = f"{self.remedy} {remedy}" if self.remedy else remedy


def in_short(error: BaseException) -> str:
    """The kind of an error and its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def warning(found: str, remedy: str) -> Result:
    """It works, but slower or less safely than it could."""
    return Result(found, "warning", remedy)


def failed(found: str, remedy: str) -> Result:
    return Result(found, "failed", remedy)


def not_applicable(found: str) -> Result:
    """There is nothing to check here, and why."""
    return Result(found, "not applicable")
