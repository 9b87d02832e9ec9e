"""Device memory for the activations of a pass, used again by every pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from loraplex_model.base.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Workspace:
    """Activations of up to `rows` rows; what an earlier pass left in them is never read.

    Attributes:
        x: [rows, hidden], the residual stream.
        normed: [rows, hidden], the input of a block.
        delta: [rows, hidden], the output of a block.
        qkv: [rows, q_size + 2 * kv_size].
        q, mixed: [rows, heads, head_dim], rotated queries and the result of attention.
        gate_up: [rows, 2 * intermediate].
        active: [rows, intermediate].
        chunks: float32 [n], sums of the chunks of contexts.
        low_rank: float32 [n], partial sums of A x.
    """

    x: torch.Tensor
    normed: torch.Tensor
    delta: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    mixed: torch.Tensor
    gate_up: torch.Tensor
    active: torch.Tensor
    chunks: torch.Tensor
    low_rank: torch.Tensor

    @staticmethod
    def of(
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rows: int,
        chunk_floats: int,
        low_rank_floats: int,
    ) -> Workspace:
        """Memory that is not initialised."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        return Workspace(
            x=empty(config.hidden_size),
            normed=empty(config.hidden_size),
            delta=empty(config.hidden_size),
            qkv=empty(config.q_size + 2 * config.kv_size),
            q=empty(config.num_heads, config.head_dim),
            mixed=empty(config.num_heads, config.head_dim),
            gate_up=empty(2 * config.intermediate_size),
            active=empty(config.intermediate_size),
            chunks=torch.empty(chunk_floats, device=device),
            low_rank=torch.empty(low_rank_floats, device=device),
        )

    @property
    def rows(self) -> int:
        """Number of rows that there is room for."""
        return len(self.x)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors."""
        return (getattr(self, field.name) for field in fields(self))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)
