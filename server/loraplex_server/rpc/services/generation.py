"""GenerationService: both calls read one generator of events; the unary one collects them."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject

from loraplex_server.access.limits.quotas import Quotas
from loraplex_server.access.principals import Principal, caller
from loraplex_server.engine.batching.fair_queue import MAX_PRIORITY
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.messages import Output
from loraplex_server.fair_weights import account_of
from loraplex_server.forms.checker import FormChecker
from loraplex_server.logs import note
from loraplex_server.metrics import Metrics
from loraplex_server.registry.registry import Registry
from loraplex_server.rpc.calls.errors import TABLE, for_client, require
from loraplex_server.rpc.messages import structured, validate
from loraplex_server.rpc.messages.completion import add_logprobs, slices
from loraplex_server.rpc.messages.slices import extend_in_slices
from loraplex_server.rpc.services.admission import Admission, Ticket, admitted_deadline
from loraplex_server.rpc.services.completions.call import CompletionRun, GenerationCall, text_of
from loraplex_server.rpc.services.completions.events import (
    delta_event,
    finished_event,
    started_event,
)
from loraplex_server.rpc.services.completions.interleaving import interleaved
from loraplex_server.rpc.services.counted import counted
from loraplex_server.rpc.services.embedding.embedder import Embedder
from loraplex_server.rpc.services.live.in_flight import InFlight
from loraplex_server.rpc.services.prompts import Prompts
from loraplex_server.rpc.services.resolve import (
    WeightedAdapter,
    records,
    resolve,
    room_beside,
    unmixable,
)
from loraplex_server.rpc.services.timing import GenerationTimes

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
    in_flight: InFlight = field(default_factory=InFlight)

    async def Embed(
        self, request: generation_pb2.EmbedRequest, context: _Context
    ) -> generation_pb2.EmbedResponse:
        """Returns the final states of texts."""
        return await Embedder(self).embed(request, context.time_remaining())

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: _Context
    ) -> generation_pb2.GenerateResponse:
        """Returns the whole completion, or all of them."""
        reply = generation_pb2.GenerateResponse()
        parts: list[generation_pb2.GenerateResponse | generation_pb2.Alternative] = [reply]
        texts: list[list[str]] = []
        async with aclosing(self._events(request, context)) as events:
            async for event in events:
                match event.WhichOneof("event"):
                    case "started":
                        reply.request_id = event.started.request_id
                        reply.adapters.extend(event.started.adapters)
                        reply.prompt_token_ids.extend(event.started.prompt_token_ids)
                        scores = event.started.prompt_logprobs
                        await extend_in_slices(reply.prompt_logprobs, scores)
                        others = range(1, validate.samples(request))
                        parts += [reply.alternatives.add() for _ in others]
                        texts = [[] for _ in parts]
                    case "delta":
                        part = parts[event.delta.index]
                        texts[event.delta.index].append(event.delta.text)
                        part.token_ids.extend(event.delta.token_ids)
                        await extend_in_slices(part.logprobs, event.delta.logprobs)
                    case "finished":
                        part = parts[event.finished.index]
                        part.text = "".join(texts[event.finished.index])
                        part.finish_reason = event.finished.finish_reason
                        part.usage.CopyFrom(event.finished.usage)
                        if event.finished.HasField("matched_stop"):
                            part.matched_stop.CopyFrom(event.finished.matched_stop)
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
        samples = validate.samples(request)
        with counted(self.metrics.principals, principal.name, deadline, samples):
            require(validate.generate(request, self.bounds, field_path))
            require(self.admission.unfit(samples, field_path + "n"))
            account = principal.name or _asked(request)
            with (
                self.quotas.enter(principal, samples) as allowance,
                self.admission.enter(account, samples) as ticket,
            ):
                adapters = await self._resolve(request, field_path, principal)
                room = room_beside(adapters, self.bounds.max_context)
                prompt = await self._prompt(request, adapters, field_path, room)
                require(validate.scores(request, len(prompt), room, field_path))
                require(self.admission.unfit(samples, field_path + "n", len(prompt)))
                structure = await structured.ask(request, self.forms, field_path)
                allowance.prompt(len(prompt))
                ticket.wait(len(prompt))
                call = GenerationCall(
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
                async with aclosing(self._run(call, samples, ticket, times)) as events:
                    async for event in events:
                        yield event

    async def _run(
        self, call: GenerationCall, samples: int, ticket: Ticket, times: GenerationTimes
    ) -> AsyncGenerator[_Event, None]:
        """Computes the completions of a call side by side, and records how they ended."""
        runs = [
            CompletionRun(
                index,
                next(self.ids),
                text_of(call, self.prompts.tokenizer),
                times.another() if index else times,
            )
            for index in range(samples)
        ]
        code = grpc.StatusCode.CANCELLED
        try:
            times.submit(records(call.adapters))
            joined = interleaved([self._complete(call, run, ticket) for run in runs])
            async with aclosing(joined) as events:
                async for event in events:
                    yield event
        except Refusal as error:
            code = TABLE[error.reason].code
            raise
        except asyncio.CancelledError:
            if call.deadline is not None and time.monotonic() >= call.deadline:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        finally:
            if all(run.is_finished for run in runs):
                code = grpc.StatusCode.OK
            for run in runs:
                self.engine.abort(run.id)
                self.metrics.generation_ended(call.names, code.name, run.text.tokens)
            tokens = sum(run.text.tokens for run in runs)
            self.metrics.principals.used(call.principal.name, "completion", tokens)
            times.end(len(call.prompt), tokens)

    async def _complete(
        self, call: GenerationCall, run: CompletionRun, ticket: Ticket
    ) -> AsyncGenerator[_Event, None]:
        """The events of one completion; the first one is `started` for the first completion."""
        begun, not_before = False, 0.0
        started = None if run.index else started_event(call)
        with (
            self.metrics.generation(call.names),
            self.in_flight.request(run.id, records(call.adapters)),
        ):
            outputs = self.engine.submit(call.submit(run.id, self.bounds, run.index))
            while taken := await outputs.take(not_before):
                for batch in slices(taken):
                    for output in batch:
                        if output.prompt_logprobs and started is not None:
                            field = started.started.prompt_logprobs
                            await add_logprobs(
                                field, self.prompts.tokenizer, output.prompt_logprobs
                            )
                        if output.started:
                            begun = True
                            self._begin(call, run, ticket, output)
                            if started is not None:
                                yield started
                    piece = run.text.take(batch)
                    run.times.tokens(len(piece.token_ids))
                    call.allowance.generated(len(piece.token_ids))
                    if piece.token_ids or piece.text:
                        yield await delta_event(piece, run.index, self.prompts.tokenizer)
                    if piece.finish:
                        self._finish(call, run, ticket, piece.finish)
                        yield finished_event(piece, len(call.prompt), run)
                        return
                    if (failure := batch[-1].error) is not None:
                        failed = Refusal(failure.reason, failure.message)
                        raise for_client(failed, _subject(call.request), call.field_of(failure))
                    if len(batch) < len(taken):
                        await asyncio.sleep(0)
                not_before = self._next_look(call) if begun else 0.0
        raise Refusal(Reason.ENGINE_FAULT, "internal error")

    def _begin(
        self, call: GenerationCall, run: CompletionRun, ticket: Ticket, output: Output
    ) -> None:
        """Records that the prompt of a completion is computed."""
        run.text.base_tokens = output.base_tokens
        run.text.cached_tokens = output.cached_tokens
        ticket.run()
        call.allowance.begin()
        self.metrics.generation_started(call.names, len(call.prompt), output.cached_tokens)
        self.metrics.principals.used(call.principal.name, "prompt", len(call.prompt))
        run.times.start(output)

    def _finish(
        self, call: GenerationCall, run: CompletionRun, ticket: Ticket, reason: str
    ) -> None:
        """Frees what a completion has taken, without waiting for the client to read its end."""
        run.is_finished = True
        run.times.finish(reason)
        self.engine.abort(run.id)
        ticket.end()
        call.allowance.end()

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

    def _next_look(self, call: GenerationCall) -> float:
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


def _asked(request: generation_pb2.GenerateRequest) -> str:
    """The account that a request names, before its names are resolved."""
    ids = [request.adapter_id] if request.adapter_id else [term.adapter_id for term in request.mix]
    return account_of([each.partition("@")[0] for each in ids])


def _subject(request: generation_pb2.GenerateRequest) -> Subject:
    named = request.adapter_id or ", ".join(term.adapter_id for term in request.mix)
    return Subject("loraplex.v1.Adapter", named)
