"""Drives a decoder as the engine does: sequences, scattered KV blocks, flat mixed passes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from loraplex_model.adapters.mix import RowGroup
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import forward
from loraplex_model.decoder.attention import PackedAttention
from loraplex_model.ops.linear import BaseLinear, DequantisedLinear

BLOCK_SIZE = 4
NUM_BLOCKS = 96


@dataclass
class Sequence:
    """Tokens, of which the first `done` have been computed."""

    ids: list[int]
    mix: Mix = ()
    done: int = 0
    blocks: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    is_long: bool = False


class Driver:
    """Runs passes; hands out KV blocks in a shuffled order, each full of NaN until written."""

    def __init__(self, decoder: Any, seed: int = 0) -> None:
        self.decoder = decoder
        self.free = list(range(len(decoder.keys[0])))
        self.copies: list[tuple[int, int]] = []
        random.Random(seed).shuffle(self.free)
        for tensors in (decoder.keys, decoder.values):
            for tensor in tensors:
                tensor.fill_(float("nan"))

    def begin_after(self, shared: list[int], count: int, ids: list[int], mix: Mix) -> Sequence:
        """A sequence behind `count` virtual tokens, whose keys and values lie in `shared` blocks.

        It reads the full ones; of the last, partly filled one the next pass makes it a copy.
        """
        blocks = shared[: count // BLOCK_SIZE]
        if count % BLOCK_SIZE:
            blocks.append(self.free.pop())
            self.copies.append((shared[len(blocks) - 1], blocks[-1]))
        return Sequence([0] * count + ids, mix, count, blocks)

    def step(self, *parts: tuple[Sequence, int]) -> None:
        """One pass: each sequence computes its next n tokens, and keeps their logits."""
        rows = []
        for sequence, n in parts:
            first, end = sequence.done, sequence.done + n
            while len(sequence.blocks) * BLOCK_SIZE < end:
                sequence.blocks.append(self.free.pop())
            rows.append((sequence.ids[first:end], first, sequence.blocks, sequence.mix))
            sequence.done = end
        total = sum(n for _, n in parts)
        is_long = [sequence.is_long for sequence, _ in parts]
        batch = ForwardBatch.build(rows, list(range(total)), is_long)
        if self.copies:
            batch = replace(batch, copies=np.array(self.copies, np.int32))
            self.copies = []
        logits = self.decoder.forward(batch)
        for (sequence, _), part in zip(parts, logits.split([n for _, n in parts]), strict=True):
            sequence.logits.append(part)

    def preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks away; it has to be computed again from its start."""
        for block in sequence.blocks:
            for tensors in (self.decoder.keys, self.decoder.values):
                for tensor in tensors:
                    tensor[block] = float("nan")
        self.free = sequence.blocks + self.free  # others are taken first
        sequence.blocks, sequence.logits, sequence.done = [], [], 0


def token_ids(seed: int, count: int, vocab: int) -> list[int]:
    """Random tokens."""
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def packed_logits(
    weights: BaseWeights,
    tokens: torch.Tensor,
    starts: list[int],
    groups: list[RowGroup],
    linear: BaseLinear | None = None,
) -> torch.Tensor:
    """float32 [T, vocab] of whole sequences laid side by side; differentiable in the adapters.

    Sequence s owns `tokens[starts[s]:starts[s + 1]]`. The tensors of the groups' adapters receive
    gradients; the base is a constant.
    """
    lengths = [end - start for start, end in pairwise(starts)]
    positions = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
    attention = PackedAttention(weights.config, starts)
    hidden = forward.hidden_states(
        weights, tokens, positions, groups, linear or DequantisedLinear(), attention
    )
    return forward.logits(weights, hidden, groups)
