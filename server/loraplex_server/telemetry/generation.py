"""Attributes of a generation's span, by OpenTelemetry's conventions for generative AI.

They say how a request was computed, never what it was about: prompts, answers, stop strings and
salts are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loraplex.v1 import generation_pb2
from loraplex_adapters.store import Record

from loraplex_server.telemetry.trace import Value

_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
)
"""Fields of `SamplingParams` for which there is an attribute. The seed is left out, since it may
exceed the largest integer of an attribute."""


def request_attributes(
    request: generation_pb2.GenerateRequest, base: str, streaming: bool
) -> dict[str, Value]:
    """What a request asks for. `base` is the name of the base model."""
    is_chat = request.WhichOneof("input") == "messages"
    named = [request.adapter_id] if request.adapter_id else [t.adapter_id for t in request.mix]
    given: dict[str, Value] = {
        "gen_ai.operation.name": "chat" if is_chat else "text_completion",
        "gen_ai.provider.name": "loraplex",
        "gen_ai.request.model": "+".join(named) or base,
        "gen_ai.request.stream": streaming,
        "gen_ai.output.type": "text",
    }
    if request.n > 1:
        given["gen_ai.request.choice.count"] = request.n
    if request.stop.HasField("max_new_tokens"):
        given["gen_ai.request.max_tokens"] = request.stop.max_new_tokens
    for field, value in request.sampling.ListFields():
        if field.name in _SAMPLING:
            given[f"gen_ai.request.{field.name}"] = float(value)
    return given


def adapter_attributes(records: Sequence[Record], base: str) -> dict[str, Value]:
    """What a request is computed with: the versions of its adapters, and their contents."""
    return {
        "gen_ai.response.model": "+".join(record.id for record in records) or base,
        "loraplex.adapter.digests": [record.digest for record in records],
    }


def usage_attributes(
    prompt_tokens: int, cached_tokens: int, generated_tokens: int, finishes: Sequence[str]
) -> dict[str, Value]:
    """What a request has taken. `finishes` are why its completions ended: none if it failed."""
    return {
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": cached_tokens,
        "gen_ai.usage.output_tokens": generated_tokens,
        **({"gen_ai.response.finish_reasons": [*finishes]} if finishes else {}),
    }
