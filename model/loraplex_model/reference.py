"""The decoder in torch: runs anywhere, and is the oracle for the hand-written kernels."""

from __future__ import annotations

import torch

from loraplex_model.adapter import AdapterTable
from loraplex_model.attention import KVCache, PagedAttention
from loraplex_model.batch import ForwardBatch
from loraplex_model.forward import hidden_states, logits
from loraplex_model.linear import BaseLinear, DenseLinear, DequantisedLinear, FusedLinear
from loraplex_model.lora import groups_of
from loraplex_model.weights import BaseWeights


class ReferenceDecoder:
    """A base model with its KV cache and its resident adapters.

    Attributes:
        table: the adapters by slot; change it between passes only.
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
        """`keep_dense` keeps the unpacked base matrices in float32 on the CPU, for speed."""
        device = weights.embed.device
        self.weights = weights
        self.table = AdapterTable(num_slots, weights.config)
        self._cache = KVCache(weights.config, num_blocks, block_size, weights.embed.dtype, device)
        self.keys, self.values = self._cache.keys, self._cache.values
        self._linear: BaseLinear
        if device.type == "cuda":
            self._linear = FusedLinear()
        else:
            self._linear = DenseLinear() if keep_dense else DequantisedLinear()

    @torch.no_grad()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Computes the pass and fills the cache; returns logits, float32 [R, vocab], on the CPU."""
        device, config = self.weights.embed.device, self.weights.config
        hidden = hidden_states(
            self.weights,
            torch.from_numpy(batch.tokens).to(device),
            torch.from_numpy(batch.positions).to(device),
            groups_of(batch, self.table, config, device),
            self._linear,
            PagedAttention(config, self._cache, batch),
        )
        wanted = torch.from_numpy(batch.logit_rows).to(device).long()
        return logits(self.weights, hidden[wanted]).cpu()
