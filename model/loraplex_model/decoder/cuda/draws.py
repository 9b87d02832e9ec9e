"""The parameters of a step's draws as the sampling kernels read them: one record for each draw.

A record is a row of int32 numbers. Floating-point fields are stored as their bits; a float64 field
takes two numbers, the low half first. The ids and counts of penalties, of any length, are one array
beside the records, which hold where each draw's parts begin and end. So two arrays of one type are
copied to the device, whatever the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]

_TINY = 1e-37
"""Smallest divisor used; smaller ones would be 0 in float32."""


class DrawParameters(Protocol):
    """How one token is chosen; the server's `DrawOrder` has these fields and explains them."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def uniform(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def seen(self) -> Int32: ...
    @property
    def counted(self) -> Int32: ...
    @property
    def counts(self) -> NDArray[np.float32]: ...
    @property
    def pending(self) -> int: ...


class Field(IntEnum):
    """Columns of a record."""

    ROW = 0
    TOP_K = auto()
    TEMPERATURE = auto()
    MIN_P = auto()
    REPETITION = auto()
    PRESENCE = auto()
    FREQUENCY = auto()
    PENDING = auto()
    TOP_P = auto()
    TOP_P_HIGH = auto()
    UNIFORM = auto()
    UNIFORM_HIGH = auto()
    IS_PENALISED = auto()
    SEEN_BEGIN = auto()
    SEEN_END = auto()
    COUNTED_BEGIN = auto()
    COUNTED_END = auto()


RECORD = len(Field)
"""Columns of a record: int32 numbers for each draw."""


@dataclass(frozen=True, slots=True)
class DrawTable:
    """The draws of one step.

    Attributes:
        records: int32 [D, RECORD], a row for each draw, with the columns of `Field`.
        lists: int32 [N], for each draw with penalties the ids of `seen`, those of `counted` and the
            bits of `counts`; N is 0 without penalties and at most 3 D times the vocabulary.
    """

    records: Int32
    lists: Int32

    @staticmethod
    def of(draws: Sequence[DrawParameters], rows: Int32) -> DrawTable:
        """The table of `draws`; draw d chooses from row `rows[d]` of the logits.

        No two draws may have the same row, since sampling changes the logits in place.
        """
        records = np.zeros((len(draws), RECORD), np.int32)
        floats = records.view(np.float32)
        records[:, Field.ROW] = rows
        lists: list[Int32] = []
        length = 0
        for record, numbers, draw in zip(records, floats, draws, strict=True):
            _fill(record, numbers, draw)
            if record[Field.IS_PENALISED]:
                parts = (draw.seen, draw.counted, draw.counts.view(np.int32))
                lists.extend(parts)
                record[Field.SEEN_BEGIN] = length
                record[Field.SEEN_END] = length + len(draw.seen)
                record[Field.COUNTED_BEGIN] = length + len(draw.seen)
                record[Field.COUNTED_END] = length + len(draw.seen) + len(draw.counted)
                length += sum(map(len, parts))
        return DrawTable(records, np.concatenate(lists) if lists else np.empty(0, np.int32))


def _fill(record: Int32, floats: NDArray[np.float32], draw: DrawParameters) -> None:
    """Writes the fields that have a fixed place; `floats` is the same record as float32."""
    record[Field.TOP_K] = min(draw.top_k, np.iinfo(np.int32).max)
    record[Field.PENDING] = draw.pending
    record[Field.TOP_P : Field.TOP_P_HIGH + 1] = np.array([draw.top_p]).view(np.int32)
    record[Field.UNIFORM : Field.UNIFORM_HIGH + 1] = np.array([draw.uniform]).view(np.int32)
    record[Field.IS_PENALISED] = (
        draw.repetition_penalty != 1.0
        or draw.presence_penalty != 0.0
        or draw.frequency_penalty != 0.0
    )
    floats[Field.TEMPERATURE] = max(draw.temperature, _TINY) if draw.temperature else 0.0
    floats[Field.MIN_P] = draw.min_p
    floats[Field.REPETITION] = max(draw.repetition_penalty, _TINY)
    floats[Field.PRESENCE] = draw.presence_penalty
    floats[Field.FREQUENCY] = draw.frequency_penalty
