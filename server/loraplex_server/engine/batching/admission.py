"""Requests that the engine refuses.

The front has checked every field of a request; what it decides alone is asserted here. A typed
refusal is left for three things: token ids beyond the model's vocabulary (the front does not check
those that its tokenizer makes), capacity, and virtual and invocation tokens, which are certain only
once the adapter's file has been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.messages import Failure, ModelInfo, Submit


class PromptAdapter(Protocol):
    """What of an adapter limits the prompts that it can be used with."""

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that it puts before every prompt."""

    @property
    def invocation_tokens(self) -> Sequence[int]:
        """As in `LoadedAdapter`."""


def refusal(
    submit: Submit, waiting: Sequence[int], info: ModelInfo, cache_tokens: int, limits: EngineLimits
) -> Failure | None:
    """Why a request cannot be accepted; None if it can.

    `waiting` has the number of prompt tokens of each request that waits already; `cache_tokens` is
    the size of the whole KV cache.
    """
    vocab_size = info.base.config.vocab_size
    size, bias = len(submit.token_ids), submit.sampling.logit_bias
    assert size > 0, "the prompt is empty"
    assert submit.max_new_tokens >= 0, "max_new_tokens is negative"
    assert not bias or 0 <= min(bias) <= max(bias) < vocab_size, "a biased token is unknown"
    if not 0 <= min(submit.token_ids) <= max(submit.token_ids) < vocab_size:
        return Failure(Reason.FIELD_INVALID, f"token ids must be below {vocab_size}")
    longest = min(info.max_context, cache_tokens + 1)
    if size + max(1, submit.max_new_tokens) > longest:
        text = f"{size} prompt tokens and {submit.max_new_tokens} new ones are more than {longest}"
        return Failure(Reason.PROMPT_TOO_LONG, text)
    if len(waiting) >= limits.max_waiting:
        return Failure(Reason.OVERLOADED, f"{len(waiting)} requests are waiting already")
    if waiting and sum(waiting) + size > limits.max_waiting_tokens:
        return Failure(Reason.OVERLOADED, f"{sum(waiting)} prompt tokens are waiting already")
    return None


def prompt_refusal(
    request: Request,
    adapters: Sequence[PromptAdapter],
    max_context: int,
    cache_tokens: int,
    block_size: int,
) -> Failure | None:
    """Why a request cannot use its adapters, of which `adapters` are known; None if it can.

    Virtual tokens have no weight, and those of two adapters have no common order, so such an
    adapter is used alone and at weight 1. An activated LoRA may have any weight, but it is used
    alone, since the adapters of a mix act on the same tokens.
    """
    virtual_tokens = max(adapter.virtual_tokens for adapter in adapters)
    refs = request.submit.adapters
    is_mix = len({ref.digest for ref in refs}) > 1
    if is_mix and any(adapter.invocation_tokens for adapter in adapters):
        text = "an activated LoRA (with invocation tokens) must be used alone"
        return Failure(Reason.ADAPTER_NOT_MIXABLE, text)
    if not virtual_tokens:
        return None
    if is_mix or sum(ref.weight for ref in refs) != 1.0:
        text = "an adapter with virtual tokens must be used alone and with weight 1"
        return Failure(Reason.ADAPTER_NOT_MIXABLE, text)
    size, new = request.prompt_len, request.submit.max_new_tokens
    cached = virtual_tokens % block_size + request.most_tokens
    if virtual_tokens + size + new > max_context or cached > cache_tokens:
        text = (
            f"{size} prompt tokens, {new} new ones and the adapter's {virtual_tokens} virtual ones "
            f"are more than the context of {max_context} or the cache holds"
        )
        return Failure(Reason.PROMPT_TOO_LONG, text)
    return None
