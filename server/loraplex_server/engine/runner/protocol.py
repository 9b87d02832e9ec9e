"""The seam between the engine and whatever computes: a real model, or a test's oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from loraplex_server.engine.messages import AdapterRef, ModelInfo

if TYPE_CHECKING:
    import torch
    from loraplex_model.base.batch import ForwardBatch


class LoadedAdapter(Protocol):
    """An adapter read, checked and packed in host memory; not (or no longer) on the device."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device, and in host memory."""

    @property
    def virtual_tokens(self) -> int:
        """Positions that it puts before every prompt."""

    @property
    def merge_nbytes(self) -> int:
        """Bytes that its dense copies would take; 0 if it changes no matrix of the layers."""


class MergedWeights(Protocol):
    """Dense copies of the matrices that an adapter changes, not yet in use."""

    @property
    def nbytes(self) -> int:
        """Bytes they take on the device."""


class ModelRunner(Protocol):
    """What the engine drives. Only `read_adapter` and `merge_adapter` may run beside the others,
    and beside each other, on the loader's threads.

    The runner owns weights, KV tensors and adapter slots. The engine owns every decision: which
    block, which slot, when. Blocks 0 to num_blocks - 1 are for requests, the `prefix_blocks` that
    follow are for adapters' virtual tokens.
    """

    info: ModelInfo
    block_size: int
    num_blocks: int
    prefix_blocks: int
    num_slots: int
    adapter_budget_bytes: int
    host_budget_bytes: int
    merge_budget_bytes: int

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Computes the pass; returns logits, float32 [R, vocab], on the CPU."""

    def read_adapter(self, ref: AdapterRef) -> LoadedAdapter:
        """Reads and packs an adapter's files. Raises `Refusal` (typed). Touches no slot."""

    def publish_adapter(self, slot: int, adapter: LoadedAdapter, blocks: Sequence[int]) -> None:
        """Makes `slot` point to the adapter and fills `blocks` with its virtual tokens' keys and
        values. Called between steps; the adapter stays usable for another publication."""

    def remove_adapter(self, slot: int) -> None:
        """Frees the slot's weights, dense copies among them. Called between steps, when no row uses
        it."""

    def merge_adapter(self, adapter: LoadedAdapter) -> MergedWeights:
        """Computes the dense copies. Runs on a loader thread; writes to nothing else."""

    def publish_merge(self, slot: int, merged: MergedWeights) -> None:
        """Lets the rows of `slot` use the copies, from the next pass on. Called between steps."""

    def remove_merge(self, slot: int) -> None:
        """Drops the copies; rows of `slot` are computed unmerged from the next pass on."""
