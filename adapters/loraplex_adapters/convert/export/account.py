"""Measures how much of an adapter's change survives rounding into a coarser type."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Kept:
    """Share of a tensor's change D = W' - W that its written form Q retains.

    Attributes:
        size: |D|^2.
        along: <Q - W, D>.
        error: |Q - W'|^2.
        quantised: whether Q is NF4 rather than a float type.
    """

    name: str
    size: float
    along: float
    error: float
    quantised: bool = False

    @property
    def retained(self) -> float:
        """<Q - W, D> / |D|^2: 1 if the change is fully retained, 0 if it was rounded away."""
        return self.along / self.size if self.size else 1.0

    @property
    def noise(self) -> float:
        """|Q - W'| / |D|: the error that rounding adds, relative to the change."""
        return math.sqrt(self.error / self.size) if self.size else 0.0


def measure(name: str, base: torch.Tensor, merged: torch.Tensor, written: torch.Tensor) -> Kept:
    """Compares three float tensors W, W' and Q of one shape; overwrites `base`."""
    error = (written.float() - merged).double().square_().sum().item()
    change = merged - base
    moved = base.neg_().add_(written.float())
    along = (moved * change).double().sum().item()
    return Kept(name, change.double().square_().sum().item(), along, error)


def total(parts: list[Kept]) -> Kept:
    """The figures of all tensors together."""
    return Kept(
        "",
        sum(part.size for part in parts),
        sum(part.along for part in parts),
        sum(part.error for part in parts),
    )
