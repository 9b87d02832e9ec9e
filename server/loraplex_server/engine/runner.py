"""The seam between the engine and whatever computes: a real model, or a test's oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from loraplex_server.engine.messages import AdapterRef, ModelInfo

if TYPE_CHECKING:
    import torch
    from loraplex_model.batch import ForwardBatch


class LoadedAdapter(Protocol):
    """An adapter read, checked and packed, but not yet published to the model."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes (or will take) on the device."""


class ModelRunner(Protocol):
    """What the engine drives. Only `read_adapter` may run beside the others, on the loader thread.

    The runner owns weights, KV tensors and adapter slots. The engine owns every decision: which
    block, which slot, when.
    """

    info: ModelInfo
    block_size: int
    num_blocks: int
    num_slots: int
    adapter_budget_bytes: int

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Computes the pass; returns logits, float32 [R, vocab], on the CPU."""

    def read_adapter(self, ref: AdapterRef) -> LoadedAdapter:
        """Reads and packs an adapter's files. Raises `AdapterError` (typed). Touches no slot."""

    def publish_adapter(self, slot: int, adapter: LoadedAdapter) -> None:
        """Makes `slot` point to the adapter. Called between steps."""

    def remove_adapter(self, slot: int) -> None:
        """Frees the slot's weights. Called between steps, when no row uses it."""
