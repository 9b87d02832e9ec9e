"""Counts of an engine's passes, updated where passes are started and read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PassTally:
    """Counts since the engine started, unless stated otherwise.

    Attributes:
        faults: passes or choices of tokens that have failed in a row, up to now.
        wasted_rows: rows whose result was dropped, because their request had ended meanwhile.
        set_back: requests that had to give up their adapter's place for another one.
        out_of_memory: passes that could not be computed for lack of device memory.
    """

    faults: int = 0
    wasted_rows: int = 0
    set_back: int = 0
    out_of_memory: int = 0
