"""A pass as the device needs it: which arrays there are, where they lie, and what they hold.

`plan_pass` turns a `ForwardBatch` into arrays, with numpy alone. A `PassShape` says how much room
each of them has: exactly enough in a pass of its own, or as much as fits a captured graph, whose
rows of padding have no tile, no chunk and no place in the cache.

The block tables lie one behind the other without padding, and behind them the lists of the draws'
penalties; both vary much in length, so they come last, and only what is used is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.adapters.table import SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.decoder.cuda.draws import RECORD, DrawTable, Field
from loraplex_model.decoder.cuda.kernels.attention import DeviceTiles
from loraplex_model.decoder.cuda.kernels.sampling import DeviceDraws
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.plan import (
    ChunkPlan,
    PlanCapacity,
    RowSegment,
    plan_chunks,
    plan_head,
)
from loraplex_model.decoder.cuda.step.own_rows import OwnRows
from loraplex_model.decoder.cuda.step.staging import Layout, Segment
from loraplex_model.decoder.cuda.tiles import FIELDS, plan_tiles

_SEQUENCE = 2  # the column of a tile's fields that says where its block table begins


@dataclass(frozen=True, slots=True)
class PassShape:
    """Room for the arrays of a pass.

    Attributes:
        rows, logits: new tokens, and rows whose logits are computed.
        short, tall: tiles of attention; see `tiles`.
        chunks: the most chunks of a short tile's context; 0 without short tiles.
        lora: sizes of the adapters' plan; None if no row has a change that the kernels make.
        draws: tokens that are chosen on the device.
        lines: lines of the logits that are kept for the host.
        ragged: int32 numbers of block tables and lists.
        copies: blocks that are copied before the pass.
        states: rows whose final states are wanted.
    """

    rows: int
    logits: int
    short: int
    tall: int
    chunks: int
    lora: PlanCapacity | None
    draws: int
    lines: int
    ragged: int
    copies: int = 0
    states: int = 0

    def layout(self, unread: int = 0) -> Layout:
        """The places of the arrays; `unread` is written behind arrays where nothing is read."""
        rows = {
            "tokens": Segment("i4", self.rows, 0),
            "table_rows": Segment("i4", self.rows, 0),
            "kv_slots": Segment("i4", self.rows, -1),
            "logit_rows": Segment("i4", self.logits, -1),
            "state_rows": Segment("i4", self.states, -1),
        }
        tiles = {
            "short": Segment("i4", self.short * FIELDS, unread),
            "short_count": Segment("i4", 1),
            "tall": Segment("i4", self.tall * FIELDS, unread),
            "tall_count": Segment("i4", 1),
        }
        lora: dict[str, Segment] = {}
        read = {"chunk_count": 0, "row_chunk": -1}
        for name, size in (self.lora.lengths() if self.lora else {}).items():
            kind = "f4" if name == "term_weight" else "i4"
            lora[name] = Segment(kind, size, read.get(name, unread))
        draws = {
            "draw": Segment("i4", self.draws * RECORD, unread),
            "draw_count": Segment("i4", 1),
            "line": Segment("i4", self.lines, unread),
            "line_count": Segment("i4", 1),
            "copies": Segment("i8", 2 * self.copies),
        }
        return Layout({**rows, **tiles, **lora, **draws, "ragged": Segment("i4", self.ragged)})


@dataclass(frozen=True, slots=True)
class PassPlan:
    """A pass on the host.

    Attributes:
        shape: the room that it needs.
        arrays: its arrays, by the names of the segments of `PassShape.layout`.
        chunks: the plan of the adapters' chunks.
        torch_segments, torch_head_segments, torch_state_segments: rows of the pass, of the logits
            and of the states with changes that need code in torch; empty if there are none.
        has_virtual: whether some of its tokens are virtual.
    """

    shape: PassShape
    arrays: Mapping[str, NDArray[Any]]
    chunks: ChunkPlan
    torch_segments: tuple[RowSegment, ...]
    torch_head_segments: tuple[RowSegment, ...]
    torch_state_segments: tuple[RowSegment, ...]
    has_virtual: bool

    @property
    def needs_torch(self) -> bool:
        """Whether some rows have changes that the kernels do not make."""
        return bool(self.torch_segments)

    def fits(self, shape: PassShape) -> bool:
        """Whether a graph of this shape can compute the pass."""
        own = self.shape
        if self.needs_torch or own.copies or own.tall or own.states:
            return False
        if own.lora is not None and (shape.lora is None or not self.chunks.fits(shape.lora)):
            return False
        return all(
            getattr(own, name) <= getattr(shape, name)
            for name in ("rows", "logits", "short", "chunks", "draws", "lines", "ragged")
        )


def plan_pass(
    batch: ForwardBatch,
    table: SlotTable,
    *,
    group: int,
    block_size: int,
    vocab: int,
    long_from: int = 0,
    draws: DrawTable | None = None,
    lines: NDArray[np.int32] | None = None,
) -> PassPlan:
    """Plans a pass whose numbers have been checked.

    Args:
        group: query heads that share a key/value head.
        vocab: number of token ids; larger ids are virtual tokens.
        long_from: see `PositionTables`.
        draws: tokens to choose.
        lines: int32 [L], rows of the logits to keep.
    """
    counts = np.diff(batch.query_starts)
    tables, starts, slots = _blocks(batch, counts, block_size)
    tiles = plan_tiles(batch.query_starts, batch.context_lens, group)
    chunks = plan_chunks(batch, table)
    has_virtual = bool(batch.tokens.max() >= vocab)
    head_segments = plan_head(batch, table).segments if chunks.segments else ()
    has_states = bool(chunks.segments) and len(batch.state_rows) > 0
    states = plan_head(batch, table, batch.state_rows).segments if has_states else ()
    segments = (*chunks.segments, *head_segments)
    needs_torch = has_virtual or any(segment.needs_torch for segment in segments)
    for fields in (tiles.short, tiles.tall):
        fields[:, _SEQUENCE] = starts[fields[:, _SEQUENCE]]
    records, lists = _records(draws, len(tables))
    kept = np.empty(0, np.int32) if lines is None else lines
    shape = PassShape(
        rows=len(batch.tokens),
        logits=len(batch.logit_rows),
        short=len(tiles.short),
        tall=len(tiles.tall),
        chunks=tiles.chunks,
        lora=chunks.capacity if len(chunks.chunk_begin) else None,
        draws=len(records),
        lines=len(kept),
        ragged=len(tables) + len(lists),
        copies=len(batch.copies),
        states=len(batch.state_rows),
    )
    arrays = {
        "tokens": batch.tokens,
        "table_rows": _table_rows(batch, counts, long_from),
        "kv_slots": slots,
        "logit_rows": batch.logit_rows,
        "state_rows": batch.state_rows,
        **_counted(short=tiles.short, tall=tiles.tall, draw=records, line=kept),
        **chunks.arrays(),
        "copies": batch.copies.T.astype(np.int64),
        "ragged": np.concatenate([tables, lists]),
    }
    own = (chunks.segments, head_segments, states) if needs_torch else ((), (), ())
    return PassPlan(shape, arrays, chunks, *own, has_virtual)


def _counted(**parts: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """Arrays by their names, and the number of rows of each."""
    counts = {f"{name}_count": np.array([len(part)], np.int32) for name, part in parts.items()}
    return {**parts, **counts}


def _table_rows(
    batch: ForwardBatch, counts: NDArray[np.int32], long_from: int
) -> NDArray[np.int32]:
    """The rows' places in `PositionTables`."""
    if not long_from or not batch.is_long.any():
        return batch.positions
    return batch.positions + np.repeat(batch.is_long, counts) * np.int32(long_from)


def _blocks(
    batch: ForwardBatch, counts: NDArray[np.int32], block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Block tables without padding, where each sequence's begins, and the rows' cache slots."""
    needed = np.where(counts > 0, -(-batch.context_lens // block_size), 0)
    is_used = np.arange(batch.block_tables.shape[1]) < needed[:, None]
    tables = batch.block_tables[is_used]
    starts = (np.cumsum(needed) - needed).astype(np.int32)
    at = np.repeat(starts, counts) + batch.positions // block_size
    slots = tables[at] * block_size + batch.positions % block_size
    return tables, starts, slots.astype(np.int32)


def _records(draws: DrawTable | None, start: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Records and lists of the draws, for lists that begin at `start` of the ragged array."""
    if draws is None:
        return np.empty((0, RECORD), np.int32), np.empty(0, np.int32)
    records = draws.records.copy()
    for column in (
        Field.SEEN_BEGIN,
        Field.SEEN_END,
        Field.COUNTED_BEGIN,
        Field.COUNTED_END,
    ):
        records[:, column] += start
    return records, draws.lists


@dataclass(frozen=True, slots=True)
class DevicePass:
    """A pass in device memory.

    Attributes:
        rows, logits: numbers of rows, padding included.
        tokens, kv_slots: int32 [rows].
        table_rows: int32 [rows], the place of each row's position in `PositionTables`.
        logit_rows: int32 [logits]; negative for padding.
        state_rows: int32 [states].
        tables: int32 [N, 1], block tables; a tile says at which row its own begins.
        short, tall: tiles; None without any.
        lora: the adapters' plan; None without any.
        draws: tokens to choose.
        lines, line_count: int32 [lines] and [1], rows of the logits to keep.
        copies: int64 [2, C], blocks to copy from and to.
        own: rows that need code in torch; None without any.
    """

    rows: int
    logits: int
    tokens: torch.Tensor
    table_rows: torch.Tensor
    kv_slots: torch.Tensor
    logit_rows: torch.Tensor
    state_rows: torch.Tensor
    tables: torch.Tensor
    short: DeviceTiles | None
    tall: DeviceTiles | None
    lora: LoraPass | None
    draws: DeviceDraws
    lines: torch.Tensor
    line_count: torch.Tensor
    copies: torch.Tensor
    own: OwnRows | None = None

    @staticmethod
    def at(
        views: Mapping[str, torch.Tensor],
        shape: PassShape,
        entries: torch.Tensor,
        own: OwnRows | None = None,
    ) -> DevicePass:
        """The pass whose arrays lie in `views`, those of the layout of `shape`."""
        lora = None
        if shape.lora is not None:
            parts = {name: views[name] for name in shape.lora.lengths()}
            lora = LoraPass.at(parts, entries, shape.lora)
        return DevicePass(
            rows=shape.rows,
            logits=shape.logits,
            tokens=views["tokens"],
            table_rows=views["table_rows"],
            kv_slots=views["kv_slots"],
            logit_rows=views["logit_rows"],
            state_rows=views["state_rows"],
            tables=views["ragged"][:, None],
            short=_tiles(views, "short", shape.short, shape.chunks),
            tall=_tiles(views, "tall", shape.tall, 0),
            lora=lora,
            draws=DeviceDraws(views["draw"].view(-1, RECORD), views["ragged"], views["draw_count"]),
            lines=views["line"],
            line_count=views["line_count"],
            copies=views["copies"].view(2, -1),
            own=own,
        )


def _tiles(
    views: Mapping[str, torch.Tensor], name: str, count: int, chunks: int
) -> DeviceTiles | None:
    if not count:
        return None
    return DeviceTiles(views[name].view(-1, FIELDS), views[f"{name}_count"], chunks)
