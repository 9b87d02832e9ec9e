"""GenerationService: both calls read one generator of events; the unary one collects them."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import Message
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject

from loraplex_server.access.limits.quotas import Allowance, Quotas
from loraplex_server.access.principals import Principal, caller
from loraplex_server.access.rules import cache_salt
from loraplex_server.engine.batching.fair_queue import MAX_PRIORITY
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.messages import Failure, Logprobs, Output, SamplingParams, Submit
from loraplex_server.engine.parameters import Structure
from loraplex_server.fair_weights import account_of
from loraplex_server.forms.checker import FormChecker
from loraplex_server.logs import REQUEST_ID, note
from loraplex_server.metrics import Metrics
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.texts import end_tokens
from loraplex_server.rpc.calls.errors import TABLE, for_client, require
from loraplex_server.rpc.messages import structured, validate
from loraplex_server.rpc.messages.completion import (
    FINISH_REASONS,
    CompletionBuilder,
    Piece,
    add_logprobs,
    slices,
)
from loraplex_server.rpc.messages.slices import extend_in_slices
from loraplex_server.rpc.services.admission import Admission, Ticket, admitted_deadline
from loraplex_server.rpc.services.counted import counted
from loraplex_server.rpc.services.prompts import Prompts
from loraplex_server.rpc.services.resolve import (
    WeightedAdapter,
    records,
    references,
    resolve,
    room_beside,
    unmixable,
)
from loraplex_server.rpc.services.timing import GenerationTimes

DEFAULT_MAX_NEW_TOKENS: Final = 256

_Event = generation_pb2.GenerateStreamResponse
_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """See loraplex/v1/generation.proto. The parts that it uses live as long as the server."""

    engine: Engine
    registry: Registry
    prompts: Prompts
    admission: Admission
    quotas: Quotas
    metrics: Metrics
    bounds: validate.ModelBounds
    stream_writes: int
    forms: FormChecker
    max_priority: int = MAX_PRIORITY
    ids: Iterator[int] = field(default_factory=itertools.count)

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: _Context
    ) -> generation_pb2.GenerateResponse:
        """Returns the whole completion."""
        reply = generation_pb2.GenerateResponse()
        pieces: list[str] = []
        async with aclosing(self._events(request, context)) as events:
            async for event in events:
                match event.WhichOneof("event"):
                    case "started":
                        reply.request_id = event.started.request_id
                        reply.adapters.extend(event.started.adapters)
                        scores = event.started.prompt_logprobs
                        await extend_in_slices(reply.prompt_logprobs, scores)
                    case "delta":
                        pieces.append(event.delta.text)
                        reply.token_ids.extend(event.delta.token_ids)
                        await extend_in_slices(reply.logprobs, event.delta.logprobs)
                    case "finished":
                        reply.finish_reason = event.finished.finish_reason
                        reply.usage.CopyFrom(event.finished.usage)
                        if event.finished.HasField("matched_stop"):
                            reply.matched_stop.CopyFrom(event.finished.matched_stop)
        reply.text = "".join(pieces)
        return reply

    async def GenerateStream(
        self, request: generation_pb2.GenerateStreamRequest, context: _Context
    ) -> AsyncGenerator[_Event, None]:
        """Streams the completion."""
        async with aclosing(self._events(request.request, context, streaming=True)) as events:
            async for event in events:
                yield event

    async def _events(
        self,
        request: generation_pb2.GenerateRequest,
        context: _Context,
        streaming: bool = False,
    ) -> AsyncGenerator[_Event, None]:
        field_path = "request." if streaming else ""
        base = self.engine.hello.model.name
        times = GenerationTimes(self.metrics, request, base, streaming)
        principal, deadline = caller(), admitted_deadline(context.time_remaining())
        with counted(self.metrics.principals, principal.name, deadline):
            require(validate.generate(request, self.bounds, field_path))
            account = principal.name or _asked(request)
            with (
                self.quotas.enter(principal) as allowance,
                self.admission.enter(account) as ticket,
            ):
                adapters = await self._resolve(request, field_path, principal)
                room = room_beside(adapters, self.bounds.max_context)
                prompt = await self._prompt(request, adapters, field_path, room)
                require(validate.scores(request, len(prompt), field_path))
                structure = await structured.ask(request, self.forms, field_path)
                allowance.prompt(len(prompt))
                ticket.wait(len(prompt))
                call = _Call(
                    request=request,
                    adapters=adapters,
                    prompt=prompt,
                    room=room,
                    deadline=deadline,
                    field_path=field_path,
                    streaming=streaming,
                    max_priority=self.max_priority,
                    principal=principal,
                    allowance=allowance,
                    structure=structure,
                )
                with self.metrics.generation(call.names):
                    async with aclosing(self._run(call, ticket, times)) as events:
                        async for event in events:
                            yield event

    async def _run(
        self, call: _Call, ticket: Ticket, times: GenerationTimes
    ) -> AsyncGenerator[_Event, None]:
        request_id = next(self.ids)
        completion = self._completion(call)
        code = grpc.StatusCode.CANCELLED
        try:
            started, begun = self._started(call), False
            not_before = 0.0
            times.submit(records(call.adapters))
            outputs = self.engine.submit(call.submit(request_id, self.bounds))
            while taken := await outputs.take(not_before):
                for batch in slices(taken):
                    for output in batch:
                        if output.prompt_logprobs:
                            field = started.started.prompt_logprobs
                            await self._add_logprobs(field, output.prompt_logprobs)
                        if output.started:
                            begun = True
                            completion.base_tokens = output.base_tokens
                            completion.cached_tokens = output.cached_tokens
                            self._begin(call, ticket, output)
                            times.start(output)
                            yield started
                    piece = completion.take(batch)
                    times.tokens(len(piece.token_ids))
                    call.allowance.generated(len(piece.token_ids))
                    if piece.token_ids or piece.text:
                        yield await self._delta(piece)
                    if piece.finish:
                        times.finish(piece.finish)
                        # Frees the rows now, without waiting for the client to read the message.
                        self.engine.abort(request_id)
                        code = grpc.StatusCode.OK
                        yield _finished(piece, len(call.prompt), completion)
                        return
                    if (failure := batch[-1].error) is not None:
                        failed = Refusal(failure.reason, failure.message)
                        raise for_client(failed, _subject(call.request), call.field_of(failure))
                    if len(batch) < len(taken):
                        await asyncio.sleep(0)
                not_before = self._next_look(call) if begun else 0.0
            raise Refusal(Reason.ENGINE_FAULT, "internal error")
        except Refusal as error:
            code = TABLE[error.reason].code
            raise
        except asyncio.CancelledError:
            if call.deadline is not None and time.monotonic() >= call.deadline:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        finally:
            self.engine.abort(request_id)
            self.metrics.generation_ended(call.names, code.name, completion.tokens)
            self.metrics.principals.used(call.principal.name, "completion", completion.tokens)
            times.end(len(call.prompt), completion.tokens)

    def _completion(self, call: _Call) -> CompletionBuilder:
        request = call.request
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        strings = list(request.stop.strings)
        return CompletionBuilder(self.prompts.tokenizer, call.prompt, strings, skip)

    async def _resolve(
        self, request: generation_pb2.GenerateRequest, field_path: str, principal: Principal
    ) -> Sequence[WeightedAdapter]:
        field = field_path + ("adapter_id" if request.adapter_id else "mix")
        try:
            adapters = await resolve(request, self.registry, principal)
        except Refusal as error:
            raise for_client(error, _subject(request), field) from error
        if adapters:
            note(digest=",".join(each.adapter.record.digest for each in adapters))
        if text := unmixable(adapters):
            reason = Reason.ADAPTER_NOT_MIXABLE
            raise Refusal(reason, text, problems=[Problem(field, text)])
        return adapters

    async def _prompt(
        self,
        request: generation_pb2.GenerateRequest,
        adapters: Sequence[WeightedAdapter],
        field_path: str,
        room: int,
    ) -> list[int]:
        template = None
        if request.WhichOneof("input") == "messages":
            template = await self.registry.template(records(adapters))
        return await self.prompts.tokenise(request, field_path, room, template)

    def _next_look(self, call: _Call) -> float:
        """Time before which further outputs are not needed; the last one is delivered at once.

        A write costs far more than a token. With few streams, tokens are sent as they come; with
        many, several at a time, so that all streams together make at most `stream_writes` writes a
        second. Stop strings must be searched for after every step.
        """
        if call.request.stop.strings:
            return 0.0
        if not call.streaming:
            return math.inf
        writes = self.stream_writes
        return time.monotonic() + self.admission.running / writes if writes else 0.0

    def _begin(self, call: _Call, ticket: Ticket, output: Output) -> None:
        """Records that the prompt of a request is computed."""
        ticket.run()
        call.allowance.begin()
        self.metrics.generation_started(call.names, len(call.prompt), output.cached_tokens)
        self.metrics.principals.used(call.principal.name, "prompt", len(call.prompt))

    def _started(self, call: _Call) -> _Event:
        """The first event of a request, still without log-probabilities of the prompt."""
        return _Event(
            started=generation_pb2.GenerationStarted(
                request_id=REQUEST_ID.get(),
                adapters=[
                    generation_pb2.ResolvedAdapter(
                        name=each.adapter.record.name,
                        version=each.adapter.record.version,
                        digest=each.adapter.record.digest,
                        weight=each.weight,
                    )
                    for each in call.adapters
                ],
                prompt_tokens=len(call.prompt),
            )
        )

    async def _delta(self, piece: Piece) -> _Event:
        event = _Event(
            delta=generation_pb2.GenerationDelta(text=piece.text, token_ids=piece.token_ids)
        )
        await self._add_logprobs(event.delta.logprobs, piece.logprobs)
        return event

    async def _add_logprobs(
        self,
        field: RepeatedCompositeFieldContainer[generation_pb2.TokenLogprobs],
        logprobs: Sequence[Logprobs],
    ) -> None:
        await add_logprobs(field, self.prompts.tokenizer, logprobs)


@dataclass(frozen=True, slots=True)
class _Call:
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

    def submit(self, request_id: int, bounds: validate.ModelBounds) -> Submit:
        """The request to the engine. Everything in it is decided here."""
        request, stop = self.request, self.request.stop
        wanted = stop.max_new_tokens if stop.HasField("max_new_tokens") else DEFAULT_MAX_NEW_TOKENS
        ends = [] if stop.ignore_eos else end_tokens(records(self.adapters), bounds.eos_token_ids)
        return Submit(
            id=request_id,
            token_ids=self.prompt,
            max_new_tokens=min(wanted, self.room - len(self.prompt)),
            adapters=references(self.adapters),
            sampling=_sampling(request.sampling),
            stop_token_ids=sorted({*ends, *stop.token_ids}),
            logprobs=_given(request, "logprobs"),
            prompt_logprobs=_given(request, "prompt_logprobs"),
            priority=min(request.priority, self._priority_ceiling),
            deadline=self.deadline,
            account=account_of(self.names),
            principal=self.principal.name,
            weight=self.principal.weight,
            cache_salt=cache_salt(self.principal, request.cache_salt),
            request_id=REQUEST_ID.get(),
            structure=self.structure.ending_with(ends) if self.structure else None,
        )


def _sampling(wire: generation_pb2.SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {field.name: value for field, value in wire.ListFields()}
    given.setdefault("seed", secrets.randbits(64))
    return SamplingParams(**{**given, "logit_bias": dict(wire.logit_bias)})


def _given(message: Message, field: str) -> Any:
    """An optional field of a message; None if it is not set."""
    return getattr(message, field) if message.HasField(field) else None


def _finished(piece: Piece, prompt: int, completion: CompletionBuilder) -> _Event:
    usage = generation_pb2.Usage(
        prompt_tokens=prompt,
        cached_prompt_tokens=completion.cached_tokens,
        completion_tokens=completion.tokens,
        base_prompt_tokens=completion.base_tokens,
    )
    return _Event(
        finished=generation_pb2.GenerationFinished(
            finish_reason=FINISH_REASONS[piece.finish],
            usage=usage,
            matched_stop=piece.matched_stop,
        )
    )


def _asked(request: generation_pb2.GenerateRequest) -> str:
    """The account that a request names, before its names are resolved."""
    ids = [request.adapter_id] if request.adapter_id else [term.adapter_id for term in request.mix]
    return account_of([each.partition("@")[0] for each in ids])


def _subject(request: generation_pb2.GenerateRequest) -> Subject:
    named = request.adapter_id or ", ".join(term.adapter_id for term in request.mix)
    return Subject("loraplex.v1.Adapter", named)
