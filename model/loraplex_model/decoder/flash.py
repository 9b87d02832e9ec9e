"""Attention over the paged cache on CUDA, by torch's FlashAttention, where it can be used."""

from __future__ import annotations

import inspect
from functools import cache

import torch

BLOCK = 256
"""FlashAttention 2 needs a paged cache with blocks of a multiple of this."""

_WIDEST = 256
_OPTIONS = frozenset(
    {"block_table", "seqused_k", "num_splits", "enable_gqa", "window_size", "scale"}
)


_PACKED_OPTIONS = frozenset({"enable_gqa", "window_size", "scale"})


def packed_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `attend_packed` cannot be used; None if it can."""
    return _unfit(device, dtype, head_dim) or _missing(_PACKED_OPTIONS) or _too_old(device)


def obstacle(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> str | None:
    """Why `attend` cannot be used; None if it can. The reason is a sentence for the log."""
    if why := _unfit(device, dtype, head_dim):
        return why
    if block_size % BLOCK:
        return f"KV blocks have {block_size} tokens, not a multiple of {BLOCK}"
    return _missing(_OPTIONS) or _too_old(device)


def _unfit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the compute type is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > _WIDEST:
        return f"heads have a width of {head_dim}, not a multiple of 8 up to {_WIDEST}"
    return None


@cache
def _missing(options: frozenset[str]) -> str | None:
    """The options that torch's function lacks; `known_faults` says in which versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    lacking = sorted(options - inspect.signature(varlen_attn).parameters.keys())
    if not lacking:
        return None
    return f"torch {torch.__version__} has varlen_attn without {', '.join(lacking)}"


@cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"the device has compute capability {major}.{minor}, below 8.0"


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    most_queries: int,
    most_keys: int,
    window: int | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of sequences side by side.

    Keys are never split among thread blocks (`num_splits=1`). Split, the kernel writes the rows of
    the first sequence only (pytorch#194167), which happens with few short sequences, where it looks
    for more parallelism. The results of a sequence would also depend on the others'.

    If each sequence has one query, at its last position, and there is no sliding window, the query
    sees all keys, so the call is not causal: only then does FlashAttention read the keys once for
    all query heads that share them.

    Args:
        q: [T, heads, head_dim], float16 or bfloat16, on CUDA.
        keys, values: [num_blocks, block_size, kv_heads, head_dim].
        query_starts, key_starts: int32 [S + 1], sums of the sequences' new tokens and of lengths.
        lengths: int32 [S], tokens of each sequence in the cache.
        tables: int32 [S, B], block tables.
        window: tokens that a query sees, itself included; None for all.
        scale: factor on queries times keys; None for `head_dim ** -0.5`.

    Returns:
        [T, heads, head_dim] in the type of q.
    """
    from torch.nn.attention.varlen import varlen_attn

    sees_all = window is None and most_queries == 1 and len(q) == len(lengths)
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q,
        keys,
        values,
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        window_size=(left, -1 if sees_all else 0),
        enable_gqa=True,
        seqused_k=lengths,
        block_table=tables,
        num_splits=1,
        scale=scale,
    )
    assert isinstance(out, torch.Tensor)  # a tuple only if the log-sum-exp is requested
    return out


def attend_packed(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    most_queries: int,
    most_keys: int,
    window: int | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention within whole sequences side by side, differentiable in q, keys and values.

    A sequence may have more keys than queries; its queries are then the last ones. Scores are not
    kept for the backward pass.

    Args:
        q: [T, heads, head_dim], float16 or bfloat16, on CUDA.
        keys, values: [K, kv_heads, head_dim].
        query_starts, key_starts: int32 [S + 1], first row of each sequence and the end of the last.
        window: tokens that a query sees, itself included; None for all.
        scale: factor on queries times keys; None for `head_dim ** -0.5`.

    Returns:
        [T, heads, head_dim] in the type of q.
    """
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        keys,
        values,
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        scale=scale,
    )
    assert isinstance(out, torch.Tensor)  # a tuple only if the log-sum-exp is requested
    return out
