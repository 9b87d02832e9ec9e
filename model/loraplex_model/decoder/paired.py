"""The form of the KV cache for products of bfloat16, as in `cpu/attention_bf16.h`.

A block of one head is keys [head_dim / 2, block_size, 2], pairs of dimensions, and values
[block_size / 2, head_dim, 2], pairs of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shapes(block_size: int, head_dim: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of a block of one head: keys, with an even number of dimensions, and values."""
    assert block_size % 2 == 0, "a pair of positions lies in one block"
    return (-(-head_dim // 2), block_size, 2), (block_size // 2, head_dim, 2)


def write(
    blocks: Sequence[int],
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> None:
    """Writes one layer's keys and values [n, kv_heads, head_dim] to the start of `blocks`.

    The caches are [num_blocks, kv_heads, *shape], with the shapes of `shapes`.
    """
    block_size = key_cache.shape[3]
    padded = torch.nn.functional.pad(keys, (0, keys.shape[2] % 2))
    for place, block in enumerate(blocks):
        own = slice(place * block_size, (place + 1) * block_size)
        k, v = padded[own], values[own]
        pairs = k.view(*k.shape[:2], -1, 2).permute(1, 2, 0, 3)  # [kv_heads, head_dim / 2, n, 2]
        key_cache[block, :, :, : len(k)] = pairs.to(key_cache)
        for parity in (0, 1):
            half = v[parity::2].transpose(0, 1)
            value_cache[block, :, : half.shape[1], :, parity] = half.to(value_cache)
