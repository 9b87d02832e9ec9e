"""Keys and values of the base, shared by requests that begin alike.

Only blocks whose tokens the base alone has computed are kept: those of requests without an adapter,
and those before the invocation of an activated LoRA. So keys and values of an adapter cannot reach
another request, whatever is loaded, replaced or merged meanwhile.

    base      | t t t t | t t t t | t t             the first block is shared by all three
    aLoRA i   | t t t t | t t i i | i t t t |       a block with a token of an adapter belongs
    aLoRA j   | t t t t | t t t j | t t             to its request alone

A key is the SHA-256 of the key of the block before and of the block's tokens. So it stands for all
tokens up to the end of the block, and no two different beginnings have the same key. Sequences that
will be long have other keys from their first block on, since a base may rotate them differently.
"""

from __future__ import annotations

import hashlib

from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.request import Request

_LONG = b"long"
"""In place of the key before the first one, of a sequence that will be long."""


def matched(request: Request, pool: BlockPool) -> list[int]:
    """Kept blocks that hold the beginning of a request, in order.

    At least one token is left to compute, from whose logits the next one is chosen. A request for
    log-probabilities of its prompt needs the logits of every token, so nothing is found for it.
    """
    if request.wants_prompt_logits:
        return []
    blocks: list[int] = []
    for at in range(min(request.base_len, len(request.tokens) - 1) // pool.block_size):
        block = pool.find(_key(request, at, pool.block_size))
        if block is None:
            break
        blocks.append(block)
    return blocks


def keep(request: Request, computed: int, pool: BlockPool) -> None:
    """Keeps the blocks of base tokens among the first `computed` tokens of a running request.

    Keys and values of these tokens must be in the KV cache.
    """
    full = min(computed, request.base_len) // pool.block_size
    for at in range(request.kept, full):
        key = _key(request, at, pool.block_size)
        if pool.find(key) is None:
            pool.keep(request.blocks[at], key)
    request.kept = max(request.kept, full)


def _key(request: Request, at: int, size: int) -> bytes:
    """The key of the request's block `at`, which is full."""
    keys = request.keys
    while len(keys) <= at:
        start = len(keys) * size
        before = keys[-1] if keys else _LONG * request.is_long
        tokens = request.tokens[start : start + size]
        assert min(tokens) >= 0, "a key of tokens that are not on the host yet"
        keys.append(hashlib.sha256(before + tokens.tobytes()).digest())
    return keys[at]
