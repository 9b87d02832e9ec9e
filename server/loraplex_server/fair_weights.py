"""Weights of accounts, as text: `pirate=3,_base=0.5`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loraplex_server.series import BASE_LABEL

MOST = 1000.0
"""Largest weight, and the inverse of the smallest."""


def account_of(names: list[str]) -> str:
    """The account of a request for adapters by their names: one for each mix, and the base's."""
    return "+".join(sorted(set(names))) or BASE_LABEL


def listed(weights: Mapping[object, object]) -> str:
    """The text of a table of weights."""
    return ",".join(f"{name}={weight}" for name, weight in weights.items())


def parse(text: str) -> dict[str, float]:
    """Weights by account. Raises ValueError for text that is not of the form."""
    weights: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        account = account_of([each.strip() for each in name.split("+")])
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name.strip() or not 1 / MOST <= weight <= MOST:
            raise ValueError(
                f"{part!r} must be a name, '=' and a number from {1 / MOST:g} to {MOST:g}"
            )
        if account in weights:
            raise ValueError(f"{account!r} has two weights")
        weights[account] = weight
    return weights
