"""Checks generation requests against the bounds of the proto and reports all problems at once.

A request that passes is in range, finite and within the model's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Final

from loraplex.v1 import generation_pb2, model_pb2
from loraplex_model.base.refusal import Problem

from loraplex_server.engine.batching.fair_queue import MAX_PRIORITY
from loraplex_server.rpc.calls.bounds import (
    MAX_CACHE_SALT,
    MAX_JSON_BYTES,
    MAX_LOGIT_BIAS,
    MAX_MIX,
    MAX_PARTS,
    MAX_REQUEST_ID,
    MAX_SHOWN,
    MAX_STOP_STRING_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TEMPLATE_VALUE_BYTES,
    MAX_TEMPLATE_VARIABLES,
    MAX_TOKEN_IDS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    MAX_TURNS,
)
from loraplex_server.rpc.calls.bounds import (
    MAX_LISTED as MAX_LISTED,
)
from loraplex_server.rpc.calls.ids import adapter_id_fault, is_request_id, name_fault
from loraplex_server.rpc.messages import structured

MAX_LOGPROBS: Final = 20
MAX_PROMPT_SCORES: Final = 1 << 20
"""Most log-probabilities of a prompt: its tokens and their alternatives together."""

MAX_SCORES: Final = 1 << 20
"""The same for the new tokens of all completions of a prompt, if there are several."""

MAX_SAMPLES: Final = 128
DEFAULT_NEW_TOKENS: Final = 256

ROLES: Final = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """Bounds that the model sets: vocabulary, context length and end-of-sequence ids.

    `max_structure` is the size of structured output in bytes; 0 if it is not served.
    """

    vocab_size: int
    max_context: int
    eos_token_ids: Sequence[int] = ()
    max_structure: int = 0


class RequestChecks:
    """Checks the fields of one request and collects their `problems`.

    `field_path` is put before the fields' names.
    """

    def __init__(self, field_path: str) -> None:
        self.problems: list[Problem] = []
        self._field_path = field_path

    def add(self, field: str, description: str) -> None:
        if len(self.problems) < MAX_LISTED:
            self.problems.append(Problem(self._field_path + field, description))

    def require(self, true: bool, field: str, description: str) -> None:
        if not true:
            self.add(field, description)

    def between(self, field: str, value: float, low: float, high: float) -> None:
        """Requires low <= value <= high; NaN is in no range."""
        self.require(low <= value <= high, field, f"must be between {low:g} and {high:g}")

    def above(self, field: str, value: float, low: float, high: float) -> None:
        """Requires low < value <= high."""
        self.require(
            low < value <= high, field, f"must be greater than {low:g} and at most {high:g}"
        )

    def at_most(self, field: str, entries: Sized, most: int) -> bool:
        """Requires at most `most` entries; returns whether the requirement is met."""
        self.require(len(entries) <= most, field, f"must have at most {most} entries")
        return len(entries) <= most

    def size(self, field: str, text: str, most: int) -> None:
        """Requires 1 to `most` bytes of UTF-8."""
        self.require(1 <= len(text.encode()) <= most, field, f"must be 1 to {most} bytes")

    def name(self, field: str, text: str) -> None:
        """Requires a name without a version."""
        fault = name_fault(text)
        self.require(not fault, field, fault)

    def adapter_id(self, field: str, text: str) -> None:
        """Requires an adapter id."""
        fault = adapter_id_fault(text)
        self.require(not fault, field, fault)

    def tokens(self, field: str, ids: Sequence[int], vocab_size: int) -> None:
        """Requires every id to be in the vocabulary; reports the first that is not."""
        if max(ids, default=0) < vocab_size:
            return
        for i, token in enumerate(ids):
            if token >= vocab_size:
                text = f"{token} is not in the vocabulary of {vocab_size} tokens"
                self.add(f"{field}[{i}]", text)
                return


def generate(
    request: generation_pb2.GenerateRequest, bounds: ModelBounds, field_path: str = ""
) -> list[Problem]:
    """Problems of a generation request; `field_path` is put before the fields' names."""
    checks = RequestChecks(field_path)
    _adapters(request, checks)
    _input(request, bounds, checks)
    if request.HasField("sampling"):
        _sampling(request.sampling, bounds, checks)
    if request.HasField("stop"):
        _stop(request, bounds, checks)
    for field in ("logprobs", "prompt_logprobs"):
        if request.HasField(field):
            checks.between(field, getattr(request, field), 0, MAX_LOGPROBS)
    if request.request_id:
        checks.require(
            is_request_id(request.request_id),
            "request_id",
            f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters",
        )
    checks.between("n", request.n, 0, MAX_SAMPLES)
    checks.between("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    if request.cache_salt:
        checks.size("cache_salt", request.cache_salt, MAX_CACHE_SALT)
    if request.HasField("structured_output"):
        structured.check(request.structured_output, bounds.max_structure, checks)
    return checks.problems


def render_chat(request: model_pb2.RenderChatRequest) -> list[Problem]:
    """Problems of a request to render a conversation."""
    checks = RequestChecks("")
    if request.adapter_id:
        checks.adapter_id("adapter_id", request.adapter_id)
    _chat(request.messages, checks)
    return checks.problems


def samples(request: generation_pb2.GenerateRequest) -> int:
    """Number of completions that a request asks for, within the bounds if it is not valid."""
    return min(max(1, request.n), MAX_SAMPLES)


def new_tokens(request: generation_pb2.GenerateRequest) -> int:
    """Most new tokens of each completion, as far as the context allows them."""
    stop = request.stop
    return stop.max_new_tokens if stop.HasField("max_new_tokens") else DEFAULT_NEW_TOKENS


def scores(
    request: generation_pb2.GenerateRequest, prompt_tokens: int, room: int, field_path: str = ""
) -> list[Problem]:
    """Problems of the numbers of log-probabilities that a request asks for.

    `room` is the context length that is left for prompt and answer.
    """
    checks = RequestChecks(field_path)
    entries = prompt_tokens * (1 + request.prompt_logprobs)
    if request.HasField("prompt_logprobs") and entries > MAX_PROMPT_SCORES:
        text = (
            f"asks for {entries} log-probabilities of a prompt of {prompt_tokens} tokens; "
            f"at most {MAX_PROMPT_SCORES} are possible"
        )
        checks.add("prompt_logprobs", text)
    count, tokens = samples(request), min(new_tokens(request), room - prompt_tokens)
    entries = count * tokens * (1 + request.logprobs)
    if request.HasField("logprobs") and count > 1 and entries > MAX_SCORES:
        text = (
            f"asks for {entries} log-probabilities of {count} completions of {tokens} tokens; "
            f"at most {MAX_SCORES} are possible"
        )
        checks.add("logprobs", text)
    return checks.problems


def detokenize(request: model_pb2.DetokenizeRequest, bounds: ModelBounds) -> list[Problem]:
    """Problems of tokens that are to become a text."""
    checks = RequestChecks("")
    checks.tokens("token_ids", request.token_ids, bounds.vocab_size)
    return checks.problems


def _adapters(request: generation_pb2.GenerateRequest, checks: RequestChecks) -> None:
    if request.adapter_id:
        checks.adapter_id("adapter_id", request.adapter_id)
        checks.require(not request.mix, "adapter_id", "must be empty when `mix` is set")
    checks.at_most("mix", request.mix, MAX_MIX)
    for i, term in enumerate(request.mix[:MAX_MIX]):
        checks.adapter_id(f"mix[{i}].adapter_id", term.adapter_id)
        if term.HasField("weight"):
            checks.between(f"mix[{i}].weight", term.weight, -16, 16)


def _input(
    request: generation_pb2.GenerateRequest, bounds: ModelBounds, checks: RequestChecks
) -> None:
    match request.WhichOneof("input"):
        case "prompt":
            checks.require(bool(request.prompt), "prompt", "must not be empty")
        case "token_ids":
            ids = request.token_ids.ids
            checks.require(bool(ids), "token_ids.ids", "must not be empty")
            checks.at_most("token_ids.ids", ids, MAX_TOKEN_IDS)
            # A prompt longer than the context is refused as such, without a check of each token.
            if len(ids) < bounds.max_context:
                checks.tokens("token_ids.ids", ids, bounds.vocab_size)
        case "messages":
            _chat(request.messages, checks)
        case None:
            checks.add("input", "one of `prompt`, `token_ids` or `messages` must be set")


def _chat(wire: generation_pb2.ChatMessages, checks: RequestChecks) -> None:
    """Checks a conversation; that its JSON texts are JSON is found when they are read."""
    checks.require(bool(wire.messages), "messages.messages", "must not be empty")
    checks.at_most("messages.messages", wire.messages, MAX_TURNS)
    for i, message in enumerate(wire.messages[:MAX_TURNS]):
        _message(message, f"messages.messages[{i}]", checks)
        if len(checks.problems) == MAX_LISTED:
            return
    if checks.at_most("messages.tools", wire.tools, MAX_TOOLS):
        for i, tool in enumerate(wire.tools):
            checks.size(f"messages.tools[{i}]", tool, MAX_JSON_BYTES)
    if wire.add_generation_prompt and wire.continue_final_message:
        text = "must not be true together with `add_generation_prompt`"
        checks.add("messages.continue_final_message", text)
    if checks.at_most(
        "messages.chat_template_kwargs", wire.chat_template_kwargs, MAX_TEMPLATE_VARIABLES
    ):
        for name, value in wire.chat_template_kwargs.items():
            _template_value(value, f"messages.chat_template_kwargs[{name[:MAX_SHOWN]}]", checks)


def _message(message: generation_pb2.ChatMessage, field: str, checks: RequestChecks) -> None:
    if message.role not in ROLES:
        checks.add(f"{field}.role", f"must be one of {', '.join(ROLES)}")
    has_content, is_assistant = message.HasField("content"), message.role == "assistant"
    if message.parts:
        checks.require(not has_content, f"{field}.parts", "must be empty if `content` is set")
        checks.at_most(f"{field}.parts", message.parts, MAX_PARTS)
        for j, part in enumerate(message.parts[:MAX_PARTS]):
            if part.WhichOneof("kind") is None:
                checks.add(
                    f"{field}.parts[{j}]",
                    "must be a text; other kinds of content are not supported",
                )
    for name in ("tool_calls", "reasoning_content"):
        is_given = bool(getattr(message, name))
        text = "is only for messages of the assistant"
        checks.require(is_assistant or not is_given, f"{field}.{name}", text)
    if message.tool_call_id and message.role != "tool":
        checks.add(f"{field}.tool_call_id", "is only for messages of the role tool")
    if message.tool_calls and checks.at_most(
        f"{field}.tool_calls", message.tool_calls, MAX_TOOL_CALLS
    ):
        for j, call in enumerate(message.tool_calls):
            where = f"{field}.tool_calls[{j}]"
            checks.require(bool(call.name), f"{where}.name", "must not be empty")
            if call.arguments:
                checks.size(f"{where}.arguments", call.arguments, MAX_JSON_BYTES)


def _template_value(value: generation_pb2.TemplateValue, field: str, checks: RequestChecks) -> None:
    match kind := value.WhichOneof("kind"):
        case None:
            checks.add(field, "must have a value")
        case "double_value":
            finite = math.isfinite(value.double_value)
            checks.require(finite, f"{field}.{kind}", "must be a finite number")
        case "string_value" | "json_value":
            count = len(getattr(value, kind).encode())
            text = f"must be at most {MAX_TEMPLATE_VALUE_BYTES} bytes"
            checks.require(count <= MAX_TEMPLATE_VALUE_BYTES, f"{field}.{kind}", text)


def _sampling(
    sampling: generation_pb2.SamplingParams, bounds: ModelBounds, checks: RequestChecks
) -> None:
    for field, (rule, low, high) in {
        "temperature": (checks.between, 0, 100),
        "min_p": (checks.between, 0, 1),
        "presence_penalty": (checks.between, -2, 2),
        "frequency_penalty": (checks.between, -2, 2),
        "top_p": (checks.above, 0, 1),
        "repetition_penalty": (checks.above, 0, 100),
    }.items():
        if sampling.HasField(field):
            rule(f"sampling.{field}", getattr(sampling, field), low, high)
    if checks.at_most("sampling.logit_bias", sampling.logit_bias, MAX_LOGIT_BIAS):
        for token, bias in sampling.logit_bias.items():
            field = f"sampling.logit_bias[{token}]"
            checks.require(token < bounds.vocab_size, field, "is not in the vocabulary")
            checks.between(field, bias, -100, 100)


def _stop(
    request: generation_pb2.GenerateRequest, bounds: ModelBounds, checks: RequestChecks
) -> None:
    stop = request.stop
    checks.at_most("stop.strings", stop.strings, MAX_STOP_STRINGS)
    for i, text in enumerate(stop.strings[:MAX_STOP_STRINGS]):
        checks.size(f"stop.strings[{i}]", text, MAX_STOP_STRING_BYTES)
    checks.at_most("stop.token_ids", stop.token_ids, MAX_STOP_TOKENS)
    checks.tokens("stop.token_ids", stop.token_ids[:MAX_STOP_TOKENS], bounds.vocab_size)
    if stop.min_new_tokens:
        most = new_tokens(request)
        text = f"must be at most `max_new_tokens`, which is {most}"
        checks.require(stop.min_new_tokens <= most, "stop.min_new_tokens", text)
        ends = {*stop.token_ids[:MAX_STOP_TOKENS], *bounds.eos_token_ids}
        text = "must be 0, as every token of the vocabulary ends the completion"
        checks.require(len(ends) < bounds.vocab_size, "stop.min_new_tokens", text)
