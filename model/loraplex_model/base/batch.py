"""The input of one forward pass: decode rows and prefill chunks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Mix = tuple[tuple[int, float], ...]
"""An adapter state: `(slot, weight)` pairs. One adapter is `((s, 1.0),)`; the bare base is `()`."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T new tokens of S sequences, sequence after sequence.

    A decode row is a sequence with one new token; a prefill chunk is one with several. The model
    treats both alike: a token's result depends on its own sequence only.

    Attributes:
        tokens: int32 [T], the new token ids.
        positions: int32 [T], each token's position in its own sequence.
        query_starts: int32 [S + 1]; sequence s owns tokens `query_starts[s]:query_starts[s + 1]`.
        context_lens: int32 [S], tokens of the sequence in the KV cache *after* this pass.
        block_tables: int32 [S, B], the sequence's KV blocks; entries past its length are not read.
        mix_starts: int32 [S + 1]; sequence s applies `mix_slots[mix_starts[s]:mix_starts[s + 1]]`.
        mix_slots: int32 [X], adapter slots.
        mix_weights: float32 [X], factors on the slots' deltas.
        logit_rows: int32 [R], the tokens (indices into `tokens`) whose logits are wanted.
        state_rows: int32 [H], the tokens whose final, normed states are wanted.
        copies: int32 [C, 2], KV blocks (from, to) that are copied before the pass.
        is_long: bool [S], sequences that will be longer than `DecoderConfig.short_positions`; empty
            if none is.

    A token id of `vocab_size + j` stands for virtual token j of the sequence's adapter.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    mix_starts: NDArray[np.int32]
    mix_slots: NDArray[np.int32]
    mix_weights: NDArray[np.float32]
    logit_rows: NDArray[np.int32]
    copies: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), np.int32))
    is_long: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    state_rows: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @staticmethod
    def build(
        sequences: list[tuple[list[int], int, list[int], Mix]],
        logit_rows: list[int] | None = None,
        is_long: list[bool] | None = None,
        state_rows: Sequence[int] = (),
    ) -> ForwardBatch:
        """Lays out `(new token ids, position of the first, KV blocks, mix)` of each sequence.

        `logit_rows` defaults to the last new token of every sequence.
        """
        widest = max((len(blocks) for _, _, blocks, _ in sequences), default=0)
        tables = np.zeros((len(sequences), max(widest, 1)), np.int32)
        tokens: list[int] = []
        positions: list[int] = []
        starts, contexts = [0], []
        mix_starts = [0]
        slots: list[int] = []
        weights: list[float] = []
        for s, (ids, first, blocks, mix) in enumerate(sequences):
            tokens.extend(ids)
            positions.extend(range(first, first + len(ids)))
            starts.append(len(tokens))
            contexts.append(first + len(ids))
            tables[s, : len(blocks)] = blocks
            slots.extend(slot for slot, _ in mix)
            weights.extend(weight for _, weight in mix)
            mix_starts.append(len(slots))
        if logit_rows is None:
            logit_rows = [end - 1 for end in starts[1:]]
        return ForwardBatch(
            np.asarray(tokens, np.int32),
            np.asarray(positions, np.int32),
            np.asarray(starts, np.int32),
            np.asarray(contexts, np.int32),
            tables,
            np.asarray(mix_starts, np.int32),
            np.asarray(slots, np.int32),
            np.asarray(weights, np.float32),
            np.asarray(logit_rows, np.int32),
            is_long=np.asarray(is_long if is_long and any(is_long) else [], np.bool_),
            state_rows=np.asarray(state_rows, np.int32),
        )
