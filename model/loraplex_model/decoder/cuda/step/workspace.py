"""Device memory for the activations of a pass, used again by every pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from loraplex_model.base.config import DecoderConfig
from loraplex_model.decoder.cuda.kernels import attention, lora
from loraplex_model.decoder.cuda.step.passes import PassShape


@dataclass(frozen=True, slots=True)
class Workspace:
    """Activations of up to `rows` rows; what an earlier pass left in them is never read.

    Attributes:
        x: [rows, hidden], the residual stream.
        normed: [rows, hidden], the input of a block.
        delta: [rows, hidden], what a block adds to the residual stream.
        second: [rows, hidden], the same of the MLP, if it is parallel to the attention; else empty.
        block: [rows, hidden], the output of a block before its norm; empty without such norms.
        qkv: [rows, q_size + 2 * kv_size].
        q, mixed: [rows, heads, head_dim], rotated queries and the result of attention.
        gate_up: [rows, 2 * intermediate], or [rows, intermediate] without a gate.
        active: [rows, intermediate].
        chunks: float32 [n], sums of the chunks of contexts.
        low_rank: float32 [n], partial sums of A x.
    """

    x: torch.Tensor
    normed: torch.Tensor
    delta: torch.Tensor
    second: torch.Tensor
    block: torch.Tensor
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
        rows: int,
        shapes: Sequence[PassShape] = (),
        chunk_floats: int = 0,
        low_rank_floats: int = 0,
    ) -> Workspace:
        """Memory, not initialised, for passes of each of `shapes`, and no less than the numbers."""
        for shape in shapes:
            rows = max(rows, shape.rows, shape.logits + shape.states)
            chunk_floats = max(chunk_floats, _chunk_floats(config, shape))
            low_rank_floats = max(low_rank_floats, _low_rank_floats(config, shape))

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        return Workspace(
            x=empty(config.hidden_size),
            normed=empty(config.hidden_size),
            delta=empty(config.hidden_size),
            second=empty(config.hidden_size if config.parallel else 0),
            block=empty(config.hidden_size if config.output_norms else 0),
            qkv=empty(config.q_size + 2 * config.kv_size),
            q=empty(config.num_heads, config.head_dim),
            mixed=empty(config.num_heads, config.head_dim),
            gate_up=empty((1 + config.gated) * config.intermediate_size),
            active=empty(config.intermediate_size),
            chunks=torch.empty(chunk_floats, device=device),
            low_rank=torch.empty(low_rank_floats, device=device),
        )

    def with_room(self, config: DecoderConfig, shape: PassShape) -> Workspace:
        """This workspace if it has room for a pass, else a larger one."""
        has_room = (
            max(shape.rows, shape.logits + shape.states) <= self.rows
            and _chunk_floats(config, shape) <= self.chunks.numel()
            and _low_rank_floats(config, shape) <= self.low_rank.numel()
        )
        if has_room:
            return self
        least = (self.chunks.numel(), self.low_rank.numel())
        return Workspace.of(config, self.x.dtype, self.x.device, self.rows, [shape], *least)

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


def _chunk_floats(config: DecoderConfig, shape: PassShape) -> int:
    """Numbers that the sums of chunks of contexts need."""
    return attention.scratch_floats(shape.short, shape.chunks, config.num_heads, config.head_dim)


def _low_rank_floats(config: DecoderConfig, shape: PassShape) -> int:
    """Numbers that the partial sums of A x need, for the fused matrix that needs most."""
    if shape.lora is None:
        return 0
    shapes, room = config.projection_shapes(), shape.lora.h_rows * shape.lora.rank_stride
    return room * max(
        lora.shrink_shape(shapes[modules[0]][0]).splits * len(modules)
        for modules in config.fused.values()
    )
