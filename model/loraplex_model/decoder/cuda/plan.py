"""The adapters of the rows of a pass, cut into chunks as the LoRA kernels read them.

Adjacent rows with the same mix form a segment, as in `make_plan` of `cpu/adapters.h`, and a segment
is cut into chunks of at most `CHUNK_ROWS` rows. Rows of the bare base are in no chunk, and neither
are rows with dense matrices of their own, nor rows whose adapters do not change the projections.

A captured graph is replayed with other plans than the one at its capture. So kernels read the
number of chunks from device memory, their grids cover `PlanCapacity`, and what lies behind a plan's
own numbers is never read into a result: it may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraplex_model.adapters.table import SlotTable, Uses
from loraplex_model.base.batch import ForwardBatch, Mix

CHUNK_ROWS = 16
"""Rows of a chunk, at most: the rows of the smallest tile of a tensor core."""

RANK_STEP = 16
"""The stride between rows of A x is a multiple of this many ranks, so that rows are aligned."""

IN_KERNELS = Uses.FACTORS | Uses.GAIN
"""Changes of a projection that the LoRA kernels make."""

IN_DENSE = Uses.FACTORS | Uses.GAIN | Uses.IN_GAIN
"""Changes that an adapter's dense matrices contain."""


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Adjacent rows with the same mix, which is not the bare base.

    Attributes:
        first, end: the rows.
        mix: slots and weights, in the order in which their changes are added.
        uses: of all its adapters, without the changes that dense matrices contain.
        merged: the slot whose dense matrices replace the base's for these rows, or -1.
    """

    first: int
    end: int
    mix: Mix
    uses: Uses
    merged: int

    @property
    def needs_torch(self) -> bool:
        """Whether the rows have changes that the LoRA kernels do not make."""
        return self.merged >= 0 or bool(self.uses & ~IN_KERNELS)


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """The sizes of the device buffers that hold a plan.

    Attributes:
        rows: rows of the pass, and chunks.
        terms: pairs of a chunk and an adapter.
        h_rows: rows of A x: one for each row and adapter.
        rank_stride: ranks between two rows of A x.
    """

    rows: int
    terms: int
    h_rows: int
    rank_stride: int

    @staticmethod
    def of_rows(rows: int, max_rank: int, adapters: int = 1) -> PlanCapacity:
        """Holds every plan of so many rows with mixes of so many adapters, up to a rank."""
        terms = rows * adapters
        return PlanCapacity(rows, terms, terms, -(-max_rank // RANK_STEP) * RANK_STEP)

    def lengths(self) -> Mapping[str, int]:
        """Elements of each array of `ChunkPlan.arrays`."""
        chunks = dict.fromkeys(("chunk_begin", "chunk_end"), self.rows)
        terms = dict.fromkeys(("term_slot", "term_weight", "term_row"), self.terms)
        starts = {"chunk_count": 1, "term_start": self.rows + 1, "row_chunk": self.rows}
        return {**chunks, **terms, **starts}


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The segments of a pass and their chunks.

    Attributes:
        segments: in the order of rows; rows of the bare base are in none.
        uses: of all segments.
        rank_stride: ranks between two rows of A x: the largest rank, rounded up to `RANK_STEP`.
        h_rows: rows of A x.
        chunk_begin, chunk_end: int32 [chunks], rows of each chunk.
        term_start: int32 [chunks + 1]; chunk c has terms `term_start[c]:term_start[c + 1]`.
        term_slot, term_weight, term_row: int32, float32, int32 [terms]: an adapter of the chunk, in
            the order of the mix; its weight; and the row of A x of the chunk's first row. Further
            rows follow.
        row_chunk: int32 [rows], the chunk of each row, or -1.
    """

    segments: tuple[RowSegment, ...]
    uses: Uses
    rank_stride: int
    h_rows: int
    chunk_begin: NDArray[np.int32]
    chunk_end: NDArray[np.int32]
    term_start: NDArray[np.int32]
    term_slot: NDArray[np.int32]
    term_weight: NDArray[np.float32]
    term_row: NDArray[np.int32]
    row_chunk: NDArray[np.int32]

    @property
    def torch_segments(self) -> Iterator[RowSegment]:
        """Segments with changes that the LoRA kernels do not make."""
        return (segment for segment in self.segments if segment.needs_torch)

    @property
    def capacity(self) -> PlanCapacity:
        """The smallest capacity that holds this plan."""
        terms, rows = len(self.term_slot), len(self.row_chunk)
        return PlanCapacity(rows, terms, self.h_rows, self.rank_stride)

    def fits(self, capacity: PlanCapacity) -> bool:
        """Whether buffers of this capacity hold the plan."""
        own = self.capacity
        return (
            own.rows <= capacity.rows
            and own.terms <= capacity.terms
            and own.h_rows <= capacity.h_rows
            and own.rank_stride <= capacity.rank_stride
        )

    def arrays(self, rows: int | None = None) -> Mapping[str, NDArray[Any]]:
        """The arrays that kernels read, by the names of `LoraPass`.

        Each goes to the front of its buffer. `row_chunk` is padded with -1 to `rows`, since rows
        behind those of the pass are computed as rows of the base; nothing else is padded.
        """
        row_chunk = self.row_chunk
        if rows is not None and rows > len(row_chunk):
            row_chunk = np.full(rows, -1, np.int32)
            row_chunk[: len(self.row_chunk)] = self.row_chunk
        return {
            "chunk_begin": self.chunk_begin,
            "chunk_end": self.chunk_end,
            "chunk_count": np.array([len(self.chunk_begin)], np.int32),
            "term_start": self.term_start,
            "term_slot": self.term_slot,
            "term_weight": self.term_weight,
            "term_row": self.term_row,
            "row_chunk": row_chunk,
        }


def plan_chunks(batch: ForwardBatch, table: SlotTable) -> ChunkPlan:
    """The plan of a pass for the projections of its layers."""
    return _plan(batch, table, batch.query_starts, range(len(batch.context_lens)), IN_KERNELS)


def plan_head(
    batch: ForwardBatch, table: SlotTable, rows: NDArray[np.int32] | None = None
) -> ChunkPlan:
    """The plan of a pass for the head, whose rows are `rows`, by default `batch.logit_rows`."""
    rows = batch.logit_rows if rows is None else rows
    owners = np.searchsorted(batch.query_starts, rows, side="right") - 1
    starts = np.flatnonzero(np.diff(owners, prepend=-1, append=-2))
    return _plan(batch, table, starts, owners[starts[:-1]].tolist(), Uses.HEAD)


def _plan(
    batch: ForwardBatch,
    table: SlotTable,
    starts: NDArray[np.integer[Any]],
    sequences: Sequence[int],
    changes: Uses,
) -> ChunkPlan:
    """The plan for runs of rows, of which run i is `starts[i]:starts[i + 1]` of `sequences[i]`.

    Segments with none of `changes` have no chunks.
    """
    segments = tuple(_segments(batch, table, starts.tolist(), sequences))
    begins: list[int] = []
    ends: list[int] = []
    term_starts = [0]
    slots: list[int] = []
    weights: list[float] = []
    h_rows: list[int] = []
    rank, used = 1, 0
    row_chunk = np.full(int(starts[-1]), -1, np.int32)
    for segment in segments:
        if not segment.uses & changes:
            continue
        rank = max(rank, *(int(table.max_ranks[slot]) for slot, _ in segment.mix))
        for begin in range(segment.first, segment.end, CHUNK_ROWS):
            end = min(begin + CHUNK_ROWS, segment.end)
            row_chunk[begin:end] = len(begins)
            begins.append(begin)
            ends.append(end)
            for slot, weight in segment.mix:
                slots.append(slot)
                weights.append(weight)
                h_rows.append(used)
                used += end - begin
            term_starts.append(len(slots))
    uses = Uses(0)
    for segment in segments:
        uses |= segment.uses
    return ChunkPlan(
        segments,
        uses,
        -(-rank // RANK_STEP) * RANK_STEP,
        used,
        np.asarray(begins, np.int32),
        np.asarray(ends, np.int32),
        np.asarray(term_starts, np.int32),
        np.asarray(slots, np.int32),
        np.asarray(weights, np.float32),
        np.asarray(h_rows, np.int32),
        row_chunk,
    )


def _segments(
    batch: ForwardBatch, table: SlotTable, starts: Sequence[int], sequences: Sequence[int]
) -> Iterator[RowSegment]:
    mix_starts, slots = batch.mix_starts.tolist(), batch.mix_slots.tolist()
    weights = batch.mix_weights.tolist()
    first = 0
    mix: Mix = ()
    for i, s in enumerate(sequences):
        if starts[i] == starts[i + 1]:
            continue
        span = slice(mix_starts[s], mix_starts[s + 1])
        own: Mix = tuple(zip(slots[span], weights[span], strict=True))
        if own == mix:
            continue
        if mix:
            yield _segment(first, starts[i], mix, table)
        first, mix = starts[i], own
    if mix:
        yield _segment(first, starts[-1], mix, table)


def _segment(first: int, end: int, mix: Mix, table: SlotTable) -> RowSegment:
    uses = Uses(0)
    for slot, _ in mix:
        uses |= Uses(int(table.uses[slot]))
    merged = -1
    if table.dense(mix) is not None:
        merged = mix[0][0]
        uses &= ~IN_DENSE
    return RowSegment(first, end, mix, uses, merged)
