"""The seam between the engine and the model: a real one, or a test's oracle."""

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
        """Bytes on the device, and in host memory."""

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that it puts before every prompt."""

    @property
    def merge_nbytes(self) -> int:
        """Bytes that its dense copies would take; 0 if it changes no matrix of the layers."""


class MergedWeights(Protocol):
    """Dense copies of the matrices that an adapter changes, not yet in use."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""


class ModelRunner(Protocol):
    """The model as the engine drives it.

    The runner owns weights, KV tensors and adapter slots; the engine decides which block and which
    slot is used, and when. All methods run on the engine's thread, except `read_adapter` and
    `merge_adapter`, which run on loader threads, concurrently with the others and with each other.

        KV blocks:  0 .. num_blocks - 1           requests
                    num_blocks .. + prefix_blocks adapters' virtual tokens
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
        """Computes a forward pass; returns logits, float32 [R, vocab], on the CPU."""

    def read_adapter(self, ref: AdapterRef) -> LoadedAdapter:
        """Reads and packs an adapter's files. Raises `Refusal`. Changes no slot."""

    def prepare_adapter(self, adapter: LoadedAdapter) -> bool:
        """Begins to copy an adapter to the device, or goes on; True once it can be published.

        Called between steps, again and again, for an adapter that there is room for. An adapter
        that was prepared is given up if another one is prepared or published instead.
        """

    def publish_adapter(self, slot: int, adapter: LoadedAdapter, blocks: Sequence[int]) -> None:
        """Puts the adapter into `slot`, and its virtual tokens' keys and values into `blocks`.

        Called between steps. The adapter can be published again later.
        """

    def remove_adapter(self, slot: int) -> None:
        """Frees the slot's weights and dense copies. Called between steps, when no row uses it."""

    def merge_adapter(self, adapter: LoadedAdapter) -> MergedWeights:
        """Computes an adapter's dense copies. Runs on a loader thread; changes nothing else."""

    def publish_merge(self, slot: int, merged: MergedWeights) -> None:
        """Lets rows of `slot` use the copies from the next pass on. Called between steps."""

    def remove_merge(self, slot: int) -> None:
        """Drops the copies: rows of `slot` are computed unmerged from the next pass on."""
