"""A valid request with everything that it needs, and its completions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import Message
from loraplex.v1 import generation_pb2
from loraplex_model.base.refusal import Reason

from loraplex_server.access.limits.quotas import Allowance
from loraplex_server.access.principals import Principal
from loraplex_server.access.rules import cache_salt
from loraplex_server.engine.messages import Failure, SamplingParams, Submit
from loraplex_server.engine.parameters import Structure
from loraplex_server.fair_weights import account_of
from loraplex_server.logs import REQUEST_ID
from loraplex_server.registry.texts import end_tokens
from loraplex_server.rpc.messages import structured, validate
from loraplex_server.rpc.messages.completion import CompletionBuilder
from loraplex_server.rpc.services.resolve import WeightedAdapter, records, references
from loraplex_server.rpc.services.timing import GenerationTimes
from loraplex_server.text.tokenizer import TextTokenizer

SEEDS: Final = 1 << 64

GREEDY: Final = SamplingParams(temperature=0.0)
"""Of a request for no tokens; choosing one in another way would only take longer."""


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """A valid request with its adapters resolved and its prompt tokenised.

    `room` is the context length that is left for prompt and answer. `field_path` is put before the
    names of the request's fields in errors.
    """

    request: generation_pb2.GenerateRequest
    adapters: Sequence[WeightedAdapter]
    prompt: list[int]
    room: int
    deadline: float | None
    field_path: str
    streaming: bool
    max_priority: int
    principal: Principal
    allowance: Allowance
    structure: Structure | None = None

    @property
    def names(self) -> list[str]:
        """Names of the adapters, each once, for metrics."""
        return list(dict.fromkeys(each.adapter.record.name for each in self.adapters))

    @property
    def _priority_ceiling(self) -> int:
        own = self.principal.limits.max_priority
        return self.max_priority if own is None else min(self.max_priority, own)

    def field_of(self, failure: Failure) -> str:
        """Path of the request's field that a failure is about."""
        if failure.reason == Reason.PROMPT_TOO_LONG.name:
            return self.field_path + (self.request.WhichOneof("input") or "input")
        if failure.reason == Reason.STRUCTURE_FAILED.name:
            return self.field_path + structured.FIELD
        return self.field_path + ("adapter_id" if self.request.adapter_id else "mix")

    def submit(self, request_id: int, bounds: validate.ModelBounds, index: int = 0) -> Submit:
        """The request to the engine for completion `index`. Everything in it is decided here.

        The prompt's log-probabilities are those of the first one, so that the others can share the
        prompt's keys and values.
        """
        request, stop = self.request, self.request.stop
        new_tokens = min(validate.new_tokens(request), self.room - len(self.prompt))
        ends = [] if stop.ignore_eos else end_tokens(records(self.adapters), bounds.eos_token_ids)
        return Submit(
            id=request_id,
            token_ids=self.prompt,
            max_new_tokens=new_tokens,
            adapters=references(self.adapters),
            sampling=_sampling(request.sampling, index) if new_tokens else GREEDY,
            stop_token_ids=sorted({*ends, *stop.token_ids}),
            min_new_tokens=stop.min_new_tokens,
            logprobs=_given(request, "logprobs"),
            prompt_logprobs=None if index else _given(request, "prompt_logprobs"),
            priority=min(request.priority, self._priority_ceiling),
            deadline=self.deadline,
            account=account_of(self.names),
            principal=self.principal.name,
            weight=self.principal.weight,
            cache_salt=cache_salt(self.principal, request.cache_salt),
            request_id=REQUEST_ID.get(),
            structure=self.structure.ending_with(ends) if self.structure else None,
        )


@dataclass(slots=True)
class CompletionRun:
    """One of the completions of a call.

    Attributes:
        id: number of its request in the engine.
        is_finished: its last token is there.
    """

    index: int
    id: int
    text: CompletionBuilder
    times: GenerationTimes
    is_finished: bool = False


def text_of(call: GenerationCall, tokenizer: TextTokenizer) -> CompletionBuilder:
    """Builds the text of one completion of a call."""
    request, stop = call.request, call.request.stop
    skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
    return CompletionBuilder(
        tokenizer,
        call.prompt,
        list(stop.strings),
        skip,
        min_tokens=stop.min_new_tokens,
        include_stop=stop.include_stop_string,
    )


def _sampling(wire: generation_pb2.SamplingParams, index: int) -> SamplingParams:
    given: dict[str, Any] = {field.name: value for field, value in wire.ListFields()}
    given["seed"] = (wire.seed + index) % SEEDS if wire.HasField("seed") else secrets.randbits(64)
    return SamplingParams(**{**given, "logit_bias": dict(wire.logit_bias)})


def _given(message: Message, field: str) -> Any:
    """An optional field of a message; None if it is not set."""
    return getattr(message, field) if message.HasField(field) else None
