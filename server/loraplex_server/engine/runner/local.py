"""The model on this machine: weights, KV tensors and adapters behind the engine's seam."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import VirtualTokens
from loraplex_model.adapters.merge import merged_nbytes
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.adapters.table import Merged
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_model.ops import build as kernels

from loraplex_server.engine.messages import AdapterRef, ModelInfo

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_SLOTS = 1024
CPU_BLOCK, CUDA_BLOCK = 16, 256  # tokens; flash attention's pages are 256


@dataclass(frozen=True, slots=True)
class Budgets:
    """What adapters may take: bytes, and KV cache tokens for virtual tokens.

    `merge_dtype` is what dense copies are kept in.
    """

    adapter_bytes: int
    host_bytes: int = 0
    merge_bytes: int = 0
    merge_dtype: torch.dtype = torch.float32
    prefix_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """An adapter in host memory, ready to be published: a `LoadedAdapter`."""

    packed: PackedAdapter
    merge_nbytes: int

    @property
    def virtual_tokens(self) -> int:
        """Positions that it puts before every prompt."""
        return self.packed.virtual_tokens

    @property
    def nbytes(self) -> int:
        """Bytes in host memory, and on the device."""
        return self.packed.nbytes


class LocalRunner:
    """A `ModelRunner` over one decoder. See the protocol for who may call what when."""

    def __init__(
        self,
        decoder: NativeDecoder | ReferenceDecoder,
        info: ModelInfo,
        num_blocks: int,
        block_size: int,
        budgets: Budgets,
        limits: AdapterLimits,
    ) -> None:
        """The decoder has `num_blocks` blocks, and `budgets.prefix_blocks` after them."""
        self.info = info
        self.num_blocks = num_blocks
        self.prefix_blocks = budgets.prefix_blocks
        self.block_size = block_size
        self.num_slots = NUM_SLOTS
        self.adapter_budget_bytes = budgets.adapter_bytes
        self.host_budget_bytes = budgets.host_bytes
        self.merge_budget_bytes = budgets.merge_bytes
        self._merge_dtype = budgets.merge_dtype
        self._decoder = decoder
        self._limits = limits
        self._device = decoder.weights.embed.device

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits, float32 [R, vocab], on the CPU."""
        with torch.inference_mode():
            return self._decoder.forward(batch).to("cpu", torch.float32)

    def read_adapter(self, ref: AdapterRef) -> ReadAdapter:
        """Reads, verifies and packs an adapter's files. Raises `Refusal`."""
        weights = self._decoder.weights
        with torch.inference_mode():
            _, delta = load(Path(ref.path), ref.digest, weights, self._limits)
            packed = pack(delta, weights.embed.dtype, pin=self._device.type == "cuda")
            dense = merged_nbytes(delta, weights.config, self._merge_dtype)
        return ReadAdapter(packed, dense)

    def publish_adapter(self, slot: int, adapter: ReadAdapter, blocks: Sequence[int]) -> None:
        """Points the slot to the adapter; computes its virtual tokens, once, into `blocks`.

        The slot stays free where this raises.
        """
        table = self._decoder.table
        table.publish(slot, adapter.packed.to(self._device))
        try:
            self._write_virtual_tokens(slot, adapter.packed.virtual, blocks)
        except BaseException:
            table.remove(slot)
            raise

    def _write_virtual_tokens(
        self, slot: int, virtual: VirtualTokens | None, blocks: Sequence[int]
    ) -> None:
        if virtual is None:
            return
        if virtual.keys is not None and virtual.values is not None:
            self._decoder.write_prefix(blocks, virtual.keys, virtual.values)
            return
        first = self.info.base.config.vocab_size
        ids = list(range(first, first + virtual.count))
        self.forward(ForwardBatch.build([(ids, 0, list(blocks), ((slot, 1.0),))]))

    def remove_adapter(self, slot: int) -> None:
        """Frees the slot and the adapter's memory, dense copies included."""
        self._decoder.table.remove(slot)

    def merge_adapter(self, adapter: ReadAdapter) -> Merged:
        """The dense copies of what the adapter changes."""
        with torch.inference_mode():
            return self._decoder.merge(adapter.packed, self._merge_dtype)

    def publish_merge(self, slot: int, merged: Merged) -> None:
        """Lets the rows of the slot use the copies."""
        self._decoder.table.publish_merge(slot, merged)

    def remove_merge(self, slot: int) -> None:
        """Drops the copies."""
        self._decoder.table.remove_merge(slot)


def build(
    *,
    model: str,
    dtype: str,
    device: str,
    threads: int,
    cache: str,
    max_context: int,
    kv_tokens: int,
    kv_memory: int,
    adapter_memory: int,
    max_rank: int,
    host_adapter_memory: int = 0,
    merge_memory: int = 0,
    merge_dtype: str = "float32",
    virtual_tokens: int = 0,
    max_virtual_tokens: int = 0,
) -> LocalRunner:
    """Loads the model and sizes the cache; see `Config` for the settings.

    Raises `Refusal` (the model) or `Refusal` (this machine), both with what to do.
    """
    on = _device(device)
    if threads:
        torch.set_num_threads(threads)
    base = load_base(model, DTYPES[dtype], Path(cache), device=on)
    weights = base.weights
    config = weights.config
    context = min(max_context or config.max_positions, config.max_positions)
    block_size = CUDA_BLOCK if on.type == "cuda" else CPU_BLOCK
    num_blocks = _num_blocks(weights, block_size, kv_tokens, kv_memory)
    prefix_blocks = -(-virtual_tokens // block_size)
    decoder = _decoder(
        weights, num_blocks + prefix_blocks, block_size, context, threads, Path(cache)
    )
    # Sampling works on a few rows; threads would only wait for each other there, and for ours.
    if isinstance(decoder, NativeDecoder):
        torch.set_num_threads(1)
    info = _info(base, on, min(context, num_blocks * block_size), decoder)
    budgets = Budgets(
        adapter_memory, host_adapter_memory, merge_memory, DTYPES[merge_dtype], prefix_blocks
    )
    limits = AdapterLimits(max_rank=max_rank, max_virtual_tokens=max_virtual_tokens)
    return LocalRunner(decoder, info, num_blocks, block_size, budgets, limits)


def _device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            Reason.NO_CUDA, "there is no CUDA device here (or torch's CPU build is installed); "
            "use --device cpu"
        )  # fmt: skip
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _num_blocks(weights: BaseWeights, block_size: int, kv_tokens: int, kv_memory: int) -> int:
    config = weights.config
    token_bytes = 2 * config.num_layers * config.kv_size * weights.embed.element_size()
    tokens = kv_tokens or kv_memory // token_bytes
    if tokens < block_size:
        raise Refusal(
            Reason.KV_TOO_SMALL,
            f"the KV cache holds {tokens} tokens and needs at least {block_size}: raise kv_memory "
            f"(a token takes {token_bytes} bytes) or kv_tokens",
        )
    return tokens // block_size


def _decoder(
    weights: BaseWeights,
    num_blocks: int,
    block_size: int,
    context: int,
    threads: int,
    cache: Path,
) -> NativeDecoder | ReferenceDecoder:
    if weights.embed.device.type == "cpu":
        try:
            return NativeDecoder(
                weights,
                num_blocks,
                block_size,
                NUM_SLOTS,
                max_positions=context,
                threads=threads or None,
                library=kernels.load(directory=cache / "kernels"),
            )
        except kernels.KernelsUnavailable as error:
            log.warning("no compiled kernels, so decoding will be many times slower: %s", error)
    return ReferenceDecoder(weights, num_blocks, block_size, NUM_SLOTS)


def _info(
    base: LoadedBase,
    device: torch.device,
    max_context: int,
    decoder: NativeDecoder | ReferenceDecoder,
) -> ModelInfo:
    kernels_used = f"C++ {decoder.isa}" if isinstance(decoder, NativeDecoder) else "torch"
    return ModelInfo(
        base=base.weights.info,
        name=base.name,
        device=str(device),
        kernels=kernels_used,
        tokenizer_path=str(base.directory),
        max_context=max_context,
        eos_token_ids=list(base.weights.eos_token_ids),
    )
