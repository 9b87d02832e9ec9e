"""Chooses the decoder for a base model: hand-written kernels where they run, torch elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.adapters.table import Merged, SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import flash
from loraplex_model.decoder.cuda import support
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_model.ops import build

log = logging.getLogger(__name__)

_CPU_BLOCK, _CUDA_BLOCK = 16, 32
_USED = 0.9  # part of a device's memory, that of other processes included

CacheSize = Callable[[int, Mapping[str, int]], int]
"""Number of KV blocks of a decoder, once everything else that it needs is on the device.

Arguments are the tokens of a block, and the bytes, by purpose, that are taken after the cache.
"""


class Decoder(Protocol):
    """What all decoders have in common; see `CudaDecoder`, `NativeDecoder`, `ReferenceDecoder`."""

    weights: BaseWeights
    table: SlotTable
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    block_size: int
    kernels: str

    def forward(self, batch: ForwardBatch, *, states: torch.Tensor | None = None) -> torch.Tensor:
        """Computes a pass; returns logits, float32 [R, vocab], on the CPU.

        Writes the final states of `batch.state_rows` to `states`, float32 [H, hidden], on the CPU.
        """

    def merge(self, adapter: PackedAdapter, dtype: torch.dtype) -> Merged:
        """Dense copies, in `dtype`, of the matrices that an adapter changes."""

    def write_prefix(self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [layers, n, kv_heads, head_dim] to the start of `blocks`."""


@dataclass(frozen=True, slots=True)
class ServingSizes:
    """What a decoder on CUDA is prepared for, so that the first requests need not wait.

    Attributes:
        max_rows: rows of a pass.
        max_draws: tokens that one pass chooses: requests that run together.
        max_rank: the largest rank of an adapter.
        has_graphs: whether CUDA graphs are captured.
        copy_bytes: device memory for copies of the base's matrices whose products are faster; None
            takes a quarter of what is free of `_USED` of the device's memory.
    """

    max_rows: int = 512
    max_draws: int = 64
    max_rank: int = 256
    has_graphs: bool = True
    copy_bytes: int | None = None


def block_size(weights: BaseWeights) -> int:
    """Tokens of a KV block of the decoder that `open_decoder` chooses."""
    if weights.embed.device.type == "cpu":
        return _CPU_BLOCK
    return flash.BLOCK if _obstacle(weights) else _CUDA_BLOCK


def open_decoder(
    weights: BaseWeights,
    num_blocks: int | CacheSize,
    num_slots: int,
    *,
    max_positions: int,
    cache: Path,
    threads: int = 0,
    serving: ServingSizes | None = None,
) -> Decoder:
    """A decoder on the device of the weights, with `num_blocks` KV blocks and empty adapter slots.

    On a CPU this is the native decoder, its kernels compiled into `cache` if need be; on CUDA the
    one with Triton's kernels, which are compiled into `cache` too. Without a compiler, or on a
    device or with weights that the kernels do not take, it is the one in torch.

    Args:
        max_positions: the longest sequence that will be computed.
        threads: CPU threads; 0 takes torch's number.
        serving: prepares a decoder on CUDA for requests; None for a few passes.
    """
    device, dtype = weights.embed.device.type, weights.embed.dtype
    size = block_size(weights)
    if device == "cuda" and (why := _obstacle(weights)) is None:
        return _on_cuda(weights, num_blocks, num_slots, max_positions, cache, serving)
    num_blocks = _blocks(num_blocks, size)
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
        try:
            return NativeDecoder(
                weights,
                num_blocks,
                size,
                num_slots,
                max_positions=max_positions,
                threads=threads or None,
                library=build.load(directory=cache / "kernels"),
            )
        except build.KernelsUnavailable as error:
            log.warning("no compiled kernels, so decoding will be many times slower: %s", error)
    elif device == "cuda":
        reasons = [f"the kernels cannot be used: {why}"]
        if slow := flash.obstacle(weights.embed.device, dtype, weights.config.head_dim, size):
            reasons.append(f"attention computes one sequence after the other: {slow}")
        log.warning("expect decoding to be many times slower: %s", "; ".join(reasons))
    return ReferenceDecoder(weights, num_blocks, size, num_slots)


def _blocks(num_blocks: int | CacheSize, size: int) -> int:
    return num_blocks if isinstance(num_blocks, int) else num_blocks(size, {})


def _obstacle(weights: BaseWeights) -> str | None:
    """Why Triton's kernels cannot compute with weights on CUDA; None if they can."""
    embed = weights.embed
    return support.obstacle_to_kernels(embed.device, embed.dtype, weights.config)


def _on_cuda(
    weights: BaseWeights,
    num_blocks: int | CacheSize,
    num_slots: int,
    max_positions: int,
    cache: Path,
    serving: ServingSizes | None,
) -> Decoder:
    kernels = cache / "kernels"
    os.environ.setdefault("TRITON_CACHE_DIR", str((kernels / "triton").absolute()))
    # Triton and its kernels are imported only where they are used.
    from loraplex_model.decoder.cuda.choices import FILE, Timings
    from loraplex_model.decoder.cuda.decoder import CudaDecoder
    from loraplex_model.decoder.cuda.graphs import GraphSizes

    sizes = serving or ServingSizes(has_graphs=False)
    device = weights.embed.device
    copy_bytes = sizes.copy_bytes
    if copy_bytes is None:
        free, total = torch.cuda.mem_get_info(device)
        copy_bytes = max(0, int(total * _USED) - (total - free)) // 4
    return CudaDecoder(
        weights,
        num_blocks,
        _CUDA_BLOCK,
        num_slots,
        max_positions=max_positions,
        max_rows=sizes.max_rows,
        max_draws=sizes.max_draws,
        graphs=GraphSizes.up_to(sizes.max_draws, sizes.max_rank) if sizes.has_graphs else None,
        copy_bytes=copy_bytes if serving else 0,
        timings=Timings(kernels / FILE, support.card_name(device, weights.embed.dtype)),
    )
