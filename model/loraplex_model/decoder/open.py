"""Chooses the decoder for a base model: the C++ kernels where they run, torch elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import flash
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_model.ops import build

log = logging.getLogger(__name__)

BLOCK_SIZE = {"cpu": 16, "cuda": flash.BLOCK}
"""Tokens of a KV block, by device type."""

CacheSize = Callable[[int, Mapping[str, int]], int]
"""Number of KV blocks of a decoder, once everything else that it needs is on the device.

Arguments are the tokens of a block, and the bytes, by purpose, that are taken after the cache.
"""

Decoder = NativeDecoder | ReferenceDecoder


def open_decoder(
    weights: BaseWeights,
    num_blocks: int | CacheSize,
    num_slots: int,
    *,
    max_positions: int,
    cache: Path,
    threads: int = 0,
) -> Decoder:
    """A decoder on the device of the weights, with `num_blocks` KV blocks and empty adapter slots.

    On a CPU this is the native decoder, its kernels compiled into `cache` if need be; without a
    compiler, or with weights in another type than float32 and bfloat16, it is the one in torch.

    Args:
        max_positions: the longest sequence that will be computed.
        threads: CPU threads; 0 takes torch's number.
    """
    device, dtype = weights.embed.device.type, weights.embed.dtype
    block_size = BLOCK_SIZE[device]
    if not isinstance(num_blocks, int):
        num_blocks = num_blocks(block_size, {})
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
        try:
            return NativeDecoder(
                weights,
                num_blocks,
                block_size,
                num_slots,
                max_positions=max_positions,
                threads=threads or None,
                library=build.load(directory=cache / "kernels"),
            )
        except build.KernelsUnavailable as error:
            log.warning("no compiled kernels, so decoding will be many times slower: %s", error)
    elif why := flash.obstacle(weights.embed.device, dtype, weights.config.head_dim, block_size):
        log.warning("attention computes one sequence after the other, many times slower: %s", why)
    return ReferenceDecoder(weights, num_blocks, block_size, num_slots)
