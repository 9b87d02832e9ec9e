"""Checks of a pass against the sizes of tables, cache and slots, before anything is launched.

The checks of `cpu/bounds.h`, in numpy. A pass that fails one computes nothing and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraplex_model.base.batch import ForwardBatch
from loraplex_model.decoder.layout import FAULTS, Fault, PassOutOfBounds


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sizes of what a pass indexes.

    Attributes:
        vocab: number of token ids.
        positions: length of the longest sequence.
        block_size: tokens of a KV block.
        blocks: number of KV blocks.
        slots: number of adapter slots.
    """

    vocab: int
    positions: int
    block_size: int
    blocks: int
    slots: int

    def check(self, batch: ForwardBatch, prompt_counts: NDArray[np.int32], drawn: int) -> None:
        """Raises `PassOutOfBounds` if a number of the batch is outside of what it indexes.

        Args:
            prompt_counts: int32 [slots], virtual tokens of each slot's adapter.
            drawn: number of tokens that the pass before drew; token id -1 - k is the k-th of them.
        """
        fault = self._fault(batch, prompt_counts, drawn)
        if fault:
            raise PassOutOfBounds(f"a pass was not computed: {FAULTS[fault]}")

    def _fault(
        self, batch: ForwardBatch, prompt_counts: NDArray[np.int32], drawn: int
    ) -> Fault | None:
        rows, sequences = len(batch.tokens), len(batch.context_lens)
        if rows < 1 or sequences < 1:
            return Fault.BAD_ROWS
        if not _in_order(batch.query_starts, sequences, rows):
            return Fault.BAD_ROWS
        if not (_within(batch.logit_rows, rows) and _within(batch.state_rows, rows)):
            return Fault.BAD_ROWS
        if len(batch.is_long) not in (0, sequences):
            return Fault.BAD_ROWS
        if not _in_order(batch.mix_starts, sequences, len(batch.mix_slots)):
            return Fault.BAD_SLOT
        if not _within(batch.mix_slots, self.slots):
            return Fault.BAD_SLOT
        counts = np.diff(batch.query_starts)
        if not self._tokens(batch, counts, prompt_counts, drawn):
            return Fault.BAD_TOKEN
        if not self._positions(batch, counts):
            return Fault.BAD_POSITION
        return None if self._blocks(batch) else Fault.BAD_BLOCK

    def _tokens(
        self,
        batch: ForwardBatch,
        counts: NDArray[np.int32],
        prompt_counts: NDArray[np.int32],
        drawn: int,
    ) -> bool:
        highest: int | NDArray[np.int64] = self.vocab
        if batch.tokens.max() >= self.vocab:  # virtual tokens, of the first adapter of a mix
            virtual = np.zeros(len(counts), np.int64)
            mixed = np.diff(batch.mix_starts) > 0
            virtual[mixed] = prompt_counts[batch.mix_slots[batch.mix_starts[:-1][mixed]]]
            highest = self.vocab + np.repeat(virtual, counts)
        return bool(np.all((batch.tokens >= -drawn) & (batch.tokens < highest)))

    def _positions(self, batch: ForwardBatch, counts: NDArray[np.int32]) -> bool:
        """Whether positions follow each other, end where the context does, and have blocks."""
        if not _within(batch.positions, self.positions):
            return False
        context = batch.context_lens.astype(np.int64)
        # row t of a sequence whose rows end before `end` is at position `context - (end - t)`
        first = np.repeat(context - batch.query_starts[1:], counts)
        if not np.array_equal(batch.positions, first + np.arange(len(batch.tokens))):
            return False
        width = batch.block_tables.shape[1]
        used = context[counts > 0]
        return bool(np.all((used + self.block_size - 1) // self.block_size <= width))

    def _blocks(self, batch: ForwardBatch) -> bool:
        if not _within(batch.copies, self.blocks):
            return False
        counts = np.diff(batch.query_starts)
        context = np.where(counts > 0, batch.context_lens, 0)
        needed = -(-context // self.block_size)
        is_used = np.arange(batch.block_tables.shape[1]) < needed[:, None]
        return _within(batch.block_tables[is_used], self.blocks)


def _within(values: NDArray[np.int32], size: int) -> bool:
    return not len(values) or bool(values.min() >= 0 and values.max() < size)


def _in_order(starts: NDArray[np.int32], count: int, total: int) -> bool:
    """Whether `starts` are the starts of `count` ranges that make up 0 to total - 1."""
    return bool(
        len(starts) == count + 1
        and starts[0] == 0
        and starts[-1] == total
        and np.all(starts[1:] >= starts[:-1])
    )
