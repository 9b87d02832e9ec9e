"""The parameters of a step's draws as the sampling kernels read them: one record for each draw.

A record is a row of int32 numbers. Floating-point fields are stored as their bits; a float64 field
takes two numbers, the low half first. The ids and counts of penalties, of any length, are one
more array; the records hold where each draw's parts of it begin and end. So two arrays of one type
are copied to the device, whatever the parameters.
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
    """Columns of a record. Groups that are written together (`_fill`) are adjacent."""

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
        records[:, Field.ROW] = rows
        if draws:
            _fill(records, draws)
        lists: list[Int32] = []
        length = 0
        for d in np.flatnonzero(records[:, Field.IS_PENALISED]).tolist():
            draw = draws[d]
            seen, counted = len(draw.seen), len(draw.counted)
            lists += (draw.seen, draw.counted, draw.counts.view(np.int32))
            records[d, Field.SEEN_BEGIN : Field.COUNTED_END + 1] = (
                length,
                length + seen,
                length + seen,
                length + seen + counted,
            )
            length += seen + 2 * counted
        return DrawTable(records, np.concatenate(lists) if lists else np.empty(0, np.int32))


def _fill(records: Int32, draws: Sequence[DrawParameters]) -> None:
    """Writes the fields of all draws, column by column: a step has little time for each draw."""
    most = np.iinfo(np.int32).max
    penalties = [
        (draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty) for draw in draws
    ]
    records[:, Field.TOP_K] = [min(draw.top_k, most) for draw in draws]
    records[:, Field.PENDING] = [draw.pending for draw in draws]
    records[:, Field.IS_PENALISED] = [values != (1.0, 0.0, 0.0) for values in penalties]
    wide = np.array([(draw.top_p, draw.uniform) for draw in draws], np.float64)
    records[:, Field.TOP_P : Field.UNIFORM_HIGH + 1] = wide.view(np.int32)
    floats = records.view(np.float32)
    floats[:, Field.REPETITION : Field.FREQUENCY + 1] = penalties
    floats[:, Field.REPETITION] = [max(values[0], _TINY) for values in penalties]
    floats[:, Field.MIN_P] = [draw.min_p for draw in draws]
    floats[:, Field.TEMPERATURE] = [
        max(draw.temperature, _TINY) if draw.temperature else 0.0 for draw in draws
    ]
