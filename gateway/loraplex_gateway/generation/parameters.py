"""The fields of requests that say how to generate, and the client's options for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from loraplex_gateway.generation import structure
from loraplex_gateway.wire.bodies import invalid

MAX_CHOICES: Final = 128
_MOST_DIGITS: Final = 10
"""Digits of the largest id that a token may have, which has 32 bits."""

PARAMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "adapter_id": "model",
        "adapter": "model",
        "mix": "loraplex.mix",
        "stop.max_new_tokens": "max_tokens",
        "max_new_tokens": "max_tokens",
        "stop.strings": "stop",
        "stop.token_ids": "stop_token_ids",
        "stop.min_new_tokens": "min_tokens",
        "stop.include_stop_string": "include_stop_str_in_output",
        "messages.messages": "messages",
        "messages.tools": "tools",
        "messages.chat_template_kwargs": "chat_template_kwargs",
        "messages.add_generation_prompt": "add_generation_prompt",
        "messages.continue_final_message": "continue_final_message",
        "token_ids.ids": "prompt",
        "token_ids": "prompt",
        "input": "prompt",
        **structure.PARAMS,
    }
)
"""Fields of the server's request, and those of the HTTP request that set them."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream reports beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against the guessing of lengths; never sent


class MixTerm(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One adapter of a mix, and the factor on its delta."""

    adapter: str
    weight: float | None = None


class LoraplexFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The field `loraplex` of a request: what OpenAI's interface has no words for."""

    mix: list[MixTerm] | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What requests for chats and for completions have in common."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    loraplex: LoraplexFields | None = None
    response_format: structure.ResponseFormat | None = None
    structured_outputs: structure.StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | structure.TextGrammar | None = None

    @property
    def choices(self) -> int:
        """Number of completions of a prompt."""
        return 1 if self.n is None else self.n

    @property
    def skips_special(self) -> bool:
        """Whether the text of an answer leaves special tokens out."""
        return self.skip_special_tokens is not False

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether every part of a stream has the numbers of tokens."""
        given = self.stream_options
        return given is not None and self.usage_at_end and bool(given.continuous_usage_stats)


def options(fields: SamplingFields) -> dict[str, Any]:
    """The client's options, but for the prompt, the model and the largest number of tokens.

    Raises ApiError (400). Ranges are the server's to check.
    """
    check(fields)
    found: dict[str, Any] = {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": 0 if fields.top_k == -1 else fields.top_k,
        "min_p": fields.min_p,
        "repetition_penalty": fields.repetition_penalty,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "logit_bias": _biases(fields.logit_bias),
        "seed": _seed(fields.seed),
        "n": fields.n if fields.choices > 1 else None,
        "min_new_tokens": fields.min_tokens or None,
        "stop": [fields.stop] if isinstance(fields.stop, str) and fields.stop else fields.stop,
        "stop_token_ids": fields.stop_token_ids,
        "include_stop_string": fields.include_stop_str_in_output or None,
        "ignore_eos": fields.ignore_eos,
        "skip_special_tokens": fields.skip_special_tokens,
        "prompt_logprobs": fields.prompt_logprobs,
        "priority": None if fields.priority is None else -fields.priority,
        "cache_salt": fields.cache_salt,
        "return_prompt_token_ids": fields.return_token_ids or None,
        **structure.options(fields),
    }
    return {name: value for name, value in found.items() if value is not None and value != ""}


def check(fields: SamplingFields) -> None:
    """Raises ApiError (400) for fields that exclude each other."""
    if not 1 <= fields.choices <= MAX_CHOICES:
        raise invalid("n", f"must be between 1 and {MAX_CHOICES}")
    if fields.best_of is not None and fields.best_of != fields.choices:
        raise invalid("best_of", "is not supported; leave it out, or set it to n")
    if fields.stream_options is not None and not fields.stream:
        raise invalid("stream_options", "is only allowed when stream is true")
    if fields.prompt_logprobs is not None:
        if fields.stream:
            raise invalid("prompt_logprobs", "is not available when stream is true")
        if fields.prompt_logprobs < 0:
            raise invalid("prompt_logprobs", "must be between 0 and 20")


def _biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    found: dict[int, float] = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) <= _MOST_DIGITS):
            raise invalid("logit_bias", f"{name[:64]!r} is not the id of a token")
        if int(name) in found:
            raise invalid("logit_bias", f"the token {int(name)} is in it twice")
        found[int(name)] = bias
    return found


def _seed(seed: int | None) -> int | None:
    """A seed of 64 bits; the server's has no sign, so a negative one is its two's complement."""
    if seed is None:
        return None
    if not -(1 << 63) <= seed < 1 << 64:
        raise invalid("seed", "must be a whole number of 64 bits")
    return seed % (1 << 64)
