"""The whole answer to a conversation."""

from __future__ import annotations

from typing import Any

from loraplex import Completion

from loraplex_gateway.chat import tooling
from loraplex_gateway.chat.request import ChatRequest
from loraplex_gateway.generation import logprobs
from loraplex_gateway.generation.answers import Head, stop_reason, usage
from loraplex_gateway.generation.samples import CompletionSample, samples_of


def answer(
    request: ChatRequest, plan: tooling.ToolPlan | None, head: Head, completion: Completion
) -> dict[str, Any]:
    """The body of the response."""
    samples = samples_of(completion)
    found = {
        **head.body("chat.completion", "chatcmpl"),
        "choices": [_choice(request, plan, i, sample) for i, sample in enumerate(samples)],
        "usage": usage(
            completion.usage.prompt_tokens,
            sum(sample.usage.completion_tokens for sample in samples),
            completion.usage.cached_prompt_tokens,
        ),
    }
    if request.prompt_logprobs is not None:
        found["prompt_logprobs"] = logprobs.prompt_logprobs(completion.prompt_logprobs)
    if request.return_token_ids:
        found["prompt_token_ids"] = list(completion.prompt_token_ids)
    return found


def _choice(
    request: ChatRequest, plan: tooling.ToolPlan | None, index: int, sample: CompletionSample
) -> dict[str, Any]:
    reader = tooling.reader(plan)
    message = tooling.chat_message([*reader.feed(sample.text), *reader.end()])
    scored = None
    if request.logprobs:
        as_ids = bool(request.return_tokens_as_token_ids)
        scored = logprobs.chat_logprobs(sample.logprobs, request.top, as_ids, request.skips_special)
    calls = bool(message.get("tool_calls"))
    found = {
        "index": index,
        "message": {"role": "assistant", **message, "refusal": None},
        "logprobs": scored,
        "finish_reason": tooling.ended(sample.finish_reason, calls, reader.is_open),
        "stop_reason": stop_reason(sample.matched_stop, request.stop_token_ids),
    }
    if request.return_token_ids:
        found["token_ids"] = list(sample.token_ids)
    return found
