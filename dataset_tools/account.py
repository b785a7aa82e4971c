"""What a source was understood as, and what of it is not read: nobody should find that out after 200 epochs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

NAMES_KEPT = 3


@dataclass(slots=True)
class Account:
    """Filled while a source is opened."""

    left_out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    """Reason → how many files, and the first names of them."""
    notes: list[str] = field(default_factory=list)
    """What changes the meaning of the data, each a sentence for the user."""

    def leave_out(self, reason: str, *names: str, count: int | None = None) -> None:
        """Note files that are not read. count: how many, if more than are named."""
        number, kept = self.left_out.get(reason, (0, []))
        kept += names[: NAMES_KEPT - len(kept)]
        self.left_out[reason] = number + (len(names) if count is None else count), kept

    def leave_out_by_extension(self, names: Iterable[str]) -> None:
        """Note files that are no images by their names."""
        for name in names:
            self.leave_out(os.path.splitext(name)[1].lower() or "without extension", name)

    def add(self, other: Account, where: object) -> None:
        """Take over what another one, of a part of the source that is called `where`, holds."""
        for reason, (count, names) in other.left_out.items():
            self.leave_out(reason, *names, count=count)
        self.notes += [f"{where}: {note}" for note in other.notes]

    def __str__(self) -> str:
        """One line, "" where nothing was left out."""
        parts = [
            f"{count:,} {reason} ({', '.join(names)}{', …' if count > len(names) else ''})"
            for reason, (count, names) in sorted(self.left_out.items(), key=lambda item: -item[1][0])
        ]
        return f"not read: {'; '.join(parts)}" if parts else ""
