"""The decoder in torch, which runs on any device and is the oracle for the hand-written kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.adapters.merge import merge_layers
from loraplex_model.adapters.mix import groups_of
from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.adapters.table import Merged, SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import FUSED
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.attention import PagedAttention
from loraplex_model.decoder.forward import hidden_states, logits
from loraplex_model.ops.linear import BaseLinear, DenseLinear, DequantisedLinear, FusedLinear


class ReferenceDecoder:
    """A base model with its KV cache and its resident adapters.

    Attributes:
        block_size: tokens of a KV block.
        kernels: what computes the passes, for people.
        table: the resident adapters; may be changed between passes only.
        keys, values: per layer [num_blocks, block_size, kv_heads, head_dim], compute dtype.
    """

    def __init__(
        self,
        weights: BaseWeights,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        *,
        keep_dense: bool = False,
    ) -> None:
        """On the CPU `keep_dense` keeps the unpacked base matrices in float32, for speed."""
        device = weights.embed.device
        self.weights = weights
        self.block_size = block_size
        self.kernels = "torch"
        self.table = SlotTable(num_slots, weights.config)
        shape = (num_blocks, block_size, weights.config.num_kv_heads, weights.config.head_dim)
        self.keys = [weights.embed.new_zeros(shape) for _ in weights.layers]
        self.values = [weights.embed.new_zeros(shape) for _ in weights.layers]
        self._linear: BaseLinear
        if device.type == "cuda":
            self._linear = FusedLinear()
        else:
            self._linear = DenseLinear() if keep_dense else DequantisedLinear()

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, *, states: torch.Tensor | None = None) -> torch.Tensor:
        """Computes a pass and fills the cache; returns logits, float32 [R, vocab], on the CPU.

        Writes the states of `batch.state_rows` to `states`, float32 [H, hidden], on the CPU.
        """
        device, config = self.weights.embed.device, self.weights.config
        copy_blocks(batch, self.keys, self.values)
        counts = np.diff(batch.query_starts)
        sequences = np.repeat(np.arange(len(counts)), counts)
        hidden = hidden_states(
            self.weights,
            torch.from_numpy(batch.tokens).to(device),
            torch.from_numpy(batch.positions).to(device),
            groups_of(batch, self.table, sequences.tolist(), device),
            self._linear,
            PagedAttention(config, self.keys, self.values, batch),
            is_long=_long_tokens(batch, counts, device),
        )
        if states is not None:
            states.copy_(hidden[torch.from_numpy(batch.state_rows).to(device).long()])
        wanted = torch.from_numpy(batch.logit_rows).to(device).long()
        groups = groups_of(batch, self.table, sequences[batch.logit_rows].tolist(), device)
        return logits(self.weights, hidden[wanted], groups).cpu()

    def merge(self, adapter: PackedAdapter, dtype: torch.dtype) -> Merged:
        """Merges an adapter: dense copies, in `dtype`, of the matrices that it changes."""
        changes = adapter.to(self.weights.embed.device).unpack()
        matrices = dict(merge_layers(self.weights, changes, dtype))
        addresses = np.zeros((self.weights.config.num_layers, len(FUSED)), np.uint64)
        return Merged(matrices, addresses, sum(matrix.nbytes for matrix in matrices.values()))

    def write_prefix(self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [layers, n, kv_heads, head_dim] to the start of `blocks`."""
        write_blocks(blocks, keys, self.keys)
        write_blocks(blocks, values, self.values)


def _long_tokens(
    batch: ForwardBatch, counts: NDArray[np.int32], device: torch.device
) -> torch.Tensor | None:
    """Whether each token is of a long sequence, bool [T]; None if none is."""
    if not batch.is_long.any():
        return None
    return torch.from_numpy(np.repeat(batch.is_long, counts)).to(device)


def write_blocks(
    blocks: Sequence[int], states: torch.Tensor, caches: Sequence[torch.Tensor]
) -> None:
    """Writes keys or values [layers, n, kv_heads, head_dim] to the start of `blocks`.

    A layer's cache is [num_blocks, block_size, kv_heads, head_dim].
    """
    for own, cache in zip(states, caches, strict=True):
        for block, part in zip(blocks, own.split(cache.shape[1]), strict=False):
            cache[block, : len(part)] = part.to(cache)


def copy_blocks(
    batch: ForwardBatch, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> None:
    """Copies the blocks in `batch.copies` in every layer's cache; dimension 0 is the block."""
    if len(batch.copies):
        source, target = torch.from_numpy(batch.copies.astype(np.int64)).T.to(keys[0].device)
        for cache in (*keys, *values):
            cache[target] = cache[source]
