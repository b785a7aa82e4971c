"""Strict accounting: every tensor that a network has, of its shape and finite, and no tensor besides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_MAX_LISTED = 12


@dataclass(slots=True, kw_only=True)
class Account:
    """What does not add up between the tensors of a file and those of a network."""

    missing: dict[str, torch.Size] = field(default_factory=dict)
    """In the network, not in the file: the shapes wanted."""
    left_over: dict[str, torch.Size] = field(default_factory=dict)
    """In the file, not in the network: the shapes there."""
    other_shape: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    """The shape in the file and the shape wanted."""
    not_numbers: list[str] = field(default_factory=list)
    """Integers where the network has fractions, or the other way round."""
    not_finite: list[str] = field(default_factory=list)
    """With NaN or infinite values."""

    @property
    def num_misfits(self) -> int:
        """Tensors that another network would fit better."""
        return sum(len(part) for part in (self.missing, self.left_over, self.other_shape, self.not_numbers))

    @property
    def num_problems(self) -> int:
        return self.num_misfits + len(self.not_finite)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append("missing: " + _listed(f"{name} {list(shape)}" for name, shape in self.missing.items()))
        if self.left_over:
            parts.append("left over: " + _listed(f"{name} {list(shape)}" for name, shape in self.left_over.items()))
        if self.other_shape:
            shapes = self.other_shape.items()
            lines = (f"{name} {list(there)} where {list(wanted)} is needed" for name, (there, wanted) in shapes)
            parts.append("of another shape: " + _listed(lines))
        if self.not_numbers:
            parts.append("of another kind of number: " + _listed(self.not_numbers))
        if self.not_finite:
            parts.append("with NaN or infinite values: " + _listed(self.not_finite))
        return "; ".join(parts)


def take_account(tensors: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> Account:
    """Compare a file's tensors with a network's `state_dict()`, which may be on the meta device.

    Any float dtype is as good as another. Values are looked at only where names and shapes agree.
    """
    account = Account()
    for name, wanted in network.items():
        if name not in tensors:
            account.missing[name] = wanted.shape
        elif tensors[name].shape != wanted.shape:
            account.other_shape[name] = (tensors[name].shape, wanted.shape)
        elif tensors[name].is_floating_point() != wanted.is_floating_point():
            account.not_numbers.append(name)
    account.left_over = {name: tensors[name].shape for name in sorted(tensors.keys() - network.keys())}
    if not account.num_misfits:
        account.not_finite = [name for name in network if not bool(tensors[name].isfinite().all())]
    return account


def _listed(lines: Iterable[str]) -> str:
    every = list(lines)
    more = f" and {len(every) - _MAX_LISTED} more" if len(every) > _MAX_LISTED else ""
    return ", ".join(every[:_MAX_LISTED]) + more
