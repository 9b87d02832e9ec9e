"""What the engine itself refuses. The front has checked it all before; this is the second line."""

from __future__ import annotations

from collections.abc import Collection

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.batching.scheduler import Limits
from loraplex_server.engine.messages import Failure, ModelInfo, Submit


def refusal(
    submit: Submit, info: ModelInfo, cache_tokens: int, limits: Limits, waiting: int, tokens: int
) -> Failure | None:
    """Why a request cannot be taken; None if it can.

    `cache_tokens` is what the whole KV cache holds; `waiting` requests with `tokens` prompt tokens
    wait already.
    """
    size = len(submit.token_ids)
    if size == 0:
        return Failure(Reason.FIELD_INVALID, "the prompt is empty")
    if submit.max_new_tokens < 1:
        return Failure(Reason.FIELD_INVALID, "max_new_tokens must be at least 1")
    vocab_size = info.base.config.vocab_size
    if not (min(submit.token_ids) >= 0 and max(submit.token_ids) < vocab_size):
        return Failure(Reason.FIELD_INVALID, f"token ids must be below {vocab_size}")
    bias = submit.sampling.logit_bias
    if bias and not (min(bias) >= 0 and max(bias) < vocab_size):
        return Failure(Reason.FIELD_INVALID, f"logit_bias ids must be below {vocab_size}")
    longest = min(info.max_context, cache_tokens + 1)
    if size + submit.max_new_tokens > longest:
        text = f"{size} prompt tokens and {submit.max_new_tokens} new ones are more than {longest}"
        return Failure(Reason.PROMPT_TOO_LONG, text)
    if waiting >= limits.max_waiting:
        return Failure(Reason.OVERLOADED, f"{waiting} requests are waiting already")
    if waiting and tokens + size > limits.max_waiting_tokens:
        return Failure(Reason.OVERLOADED, f"{tokens} prompt tokens are waiting already")
    return None


def prefix_refusal(
    request: Request,
    digests: Collection[str],
    virtual_tokens: int,
    max_context: int,
    num_blocks: int,
    block_size: int,
) -> Failure | None:
    """Why a request cannot use an adapter with `virtual_tokens`; None if it can.

    `digests` are all the adapters that it names. Virtual tokens have no weight, and those of two
    adapters no common order, so such an adapter is used alone and in full.
    """
    if not virtual_tokens:
        return None
    if len(digests) > 1 or sum(ref.weight for ref in request.submit.adapters) != 1.0:
        text = "an adapter with virtual tokens must be used alone and with weight 1"
        return Failure(Reason.ADAPTER_NOT_MIXABLE, text)
    size, new = request.prompt_len, request.submit.max_new_tokens
    cached = virtual_tokens % block_size + request.most_tokens
    if virtual_tokens + size + new > max_context or cached > num_blocks * block_size:
        text = (
            f"{size} prompt tokens, {new} new ones and the adapter's {virtual_tokens} virtual ones "
            f"are more than the context of {max_context} or the cache holds"
        )
        return Failure(Reason.PROMPT_TOO_LONG, text)
    return None
