"""The final states of texts as vectors, computed in the engine's ordinary steps.

A call takes one place among the requests of the server and of its principal, and the tokens of all
its texts. The engine gets `AT_ONCE` of its texts at a time, so a call with many texts does not fill
the queue, and each of them shares the engine as a prompt of the same account does.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import grpc
from loraplex.v1 import generation_pb2
from loraplex_model.base.refusal import Reason, Refusal, Subject

from loraplex_server.access.limits.quotas import Allowance, Quotas
from loraplex_server.access.principals import Principal, caller
from loraplex_server.access.rules import cache_salt
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.messages import Failure, Output, Submit
from loraplex_server.fair_weights import account_of
from loraplex_server.logs import REQUEST_ID, note
from loraplex_server.metrics import Metrics
from loraplex_server.registry.registry import Registry
from loraplex_server.rpc.calls.errors import TABLE, for_client, require
from loraplex_server.rpc.messages import validate_embed
from loraplex_server.rpc.messages.validate import ModelBounds
from loraplex_server.rpc.services.admission import Admission, Ticket, admitted_deadline
from loraplex_server.rpc.services.counted import counted
from loraplex_server.rpc.services.live.in_flight import InFlight
from loraplex_server.rpc.services.prompts import Prompts
from loraplex_server.rpc.services.resolve import (
    WeightedAdapter,
    records,
    references,
    resolve,
    room_beside,
)

AT_ONCE: Final = 16
"""Texts of one call that the engine has at once."""

TOKENS_AT_ONCE: Final = 8192
"""Tokens of these texts together, unless one text alone has more."""

POOLINGS: Final = {
    generation_pb2.POOLING_UNSPECIFIED: "last",
    generation_pb2.POOLING_LAST: "last",
    generation_pb2.POOLING_MEAN: "mean",
}


class GenerationParts(Protocol):
    """The parts of the generation service, which live as long as the server."""

    engine: Engine
    registry: Registry
    prompts: Prompts
    admission: Admission
    quotas: Quotas
    metrics: Metrics
    bounds: ModelBounds
    in_flight: InFlight
    ids: Iterator[int]
    max_priority: int


@dataclass(frozen=True, slots=True)
class Embedder:
    """Answers Embed calls with the parts of the generation service."""

    parts: GenerationParts

    async def embed(
        self, request: generation_pb2.EmbedRequest, seconds: float | None
    ) -> generation_pb2.EmbedResponse:
        """The vectors of a request's texts; `seconds` is the time that is left for the call.

        Raises Refusal. If one text fails, so does the call.
        """
        principal, deadline = caller(), admitted_deadline(seconds)
        width = self.parts.engine.hello.model.base.config.hidden_size
        with counted(self.parts.metrics.principals, principal.name, deadline):
            require(validate_embed.embed(request, self.parts.bounds, width))
            account = principal.name or account_of(_names(request.adapter_id))
            with (
                self.parts.quotas.enter(principal) as allowance,
                self.parts.admission.enter(account) as ticket,
            ):
                adapters = await self._resolve(request, principal)
                room = room_beside(adapters, self.parts.bounds.max_context)
                texts = await self._texts(request, room)
                total = sum(map(len, texts))
                require(validate_embed.total_tokens(total))
                allowance.prompt(total)
                call = EmbedCall(request, adapters, texts, deadline, principal, allowance, ticket)
                ticket.wait(sum(map(len, texts[: call.at_once])))
                with self.parts.metrics.generation(call.names):
                    outputs = await self._counted(call)
        return await _reply(call, outputs)

    async def _resolve(
        self, request: generation_pb2.EmbedRequest, principal: Principal
    ) -> Sequence[WeightedAdapter]:
        named = generation_pb2.GenerateRequest(adapter_id=request.adapter_id)
        try:
            adapters = await resolve(named, self.parts.registry, principal)
        except Refusal as error:
            raise for_client(error, _subject(request), "adapter_id") from error
        if adapters:
            note(digest=",".join(each.adapter.record.digest for each in adapters))
        return adapters

    async def _texts(
        self, request: generation_pb2.EmbedRequest, room: int
    ) -> Sequence[Sequence[int]]:
        """The tokens of each text."""
        found = []
        for i, given in enumerate(request.inputs):
            kind = given.WhichOneof("input")
            text = given.text if kind == "text" else list(given.token_ids.ids)
            found.append(await self.parts.prompts.ids(text, f"inputs[{i}].{kind}", room))
            if i % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)  # short texts are tokenised without a pause
        return found

    async def _counted(self, call: EmbedCall) -> list[Output]:
        """The engine's output for each text; counts the call for its adapters."""
        code = grpc.StatusCode.CANCELLED
        try:
            outputs = await self._outputs(call)
            code = grpc.StatusCode.OK
        except Refusal as error:
            code = TABLE[error.reason].code
            raise
        finally:
            self.parts.metrics.generation_ended(call.names, code.name, 0)
        return outputs

    async def _outputs(self, call: EmbedCall) -> list[Output]:
        """The engine's output for each text, of which it gets some at a time."""
        found: dict[int, Output] = {}
        waiting = iter(range(len(call.texts)))

        async def work() -> None:
            for at in waiting:
                found[at] = await self._one(call, at)
                if len(found) == 1:
                    call.ticket.run()
                    call.allowance.begin()
                self._note(call, len(call.texts[at]), found[at])

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(call.at_once):
                    group.create_task(work())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return [found[at] for at in range(len(call.texts))]

    async def _one(self, call: EmbedCall, at: int) -> Output:
        """The engine's output for one text. Raises Refusal."""
        number = next(self.parts.ids)
        with self.parts.in_flight.request(number, records(call.adapters)):
            try:
                stream = self.parts.engine.submit(call.submit(number, at, self.parts.max_priority))
                (output,) = await stream.take()
            finally:
                self.parts.engine.abort(number)
        if output.error is not None:
            failed = Refusal(output.error.reason, output.error.message)
            raise for_client(failed, _subject(call.request), call.field_of(output.error, at))
        return output

    def _note(self, call: EmbedCall, tokens: int, output: Output) -> None:
        """Records that a text is computed."""
        self.parts.metrics.series.queue_wait_seconds.observe(output.queue_seconds)
        self.parts.metrics.generation_started(call.names, tokens, output.cached_tokens)
        self.parts.metrics.principals.used(call.principal.name, "prompt", tokens)


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """A valid request with its adapters resolved and its texts tokenised."""

    request: generation_pb2.EmbedRequest
    adapters: Sequence[WeightedAdapter]
    texts: Sequence[Sequence[int]]
    deadline: float | None
    principal: Principal
    allowance: Allowance
    ticket: Ticket

    @property
    def at_once(self) -> int:
        """Number of its texts that the engine has at once."""
        longest = max(map(len, self.texts))
        return max(1, min(AT_ONCE, len(self.texts), TOKENS_AT_ONCE // longest))

    @property
    def names(self) -> list[str]:
        """Names of the adapters, for metrics."""
        return [each.adapter.record.name for each in self.adapters]

    def field_of(self, failure: Failure, at: int) -> str:
        """Path of the request's field that the failure of text `at` is about."""
        if failure.reason is Reason.PROMPT_TOO_LONG:
            return f"inputs[{at}].{self.request.inputs[at].WhichOneof('input')}"
        return "adapter_id"

    def submit(self, number: int, at: int, max_priority: int) -> Submit:
        """Text `at` as a request to the engine."""
        own = self.principal.limits.max_priority
        return Submit(
            id=number,
            token_ids=list(self.texts[at]),
            max_new_tokens=1,
            adapters=references(self.adapters),
            priority=min(0, max_priority, 0 if own is None else own),
            deadline=self.deadline,
            account=account_of(self.names),
            cache_salt=cache_salt(self.principal, ""),
            principal=self.principal.name,
            weight=self.principal.weight,
            request_id=REQUEST_ID.get(),
            pooling=POOLINGS[self.request.pooling],
            unit_length=not self.request.raw_length,
        )


async def _reply(call: EmbedCall, outputs: Sequence[Output]) -> generation_pb2.EmbedResponse:
    """The reply with the vectors, which are copied some at a time."""
    reply = generation_pb2.EmbedResponse(
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
    )
    for at, (text, output) in enumerate(zip(call.texts, outputs, strict=True)):
        values = array("f", output.state)
        reply.embeddings.add(values=values, tokens=len(text), base_tokens=output.base_tokens)
        if at % AT_ONCE == AT_ONCE - 1:
            await asyncio.sleep(0)
    return reply


def _names(adapter_id: str) -> list[str]:
    return [adapter_id.partition("@")[0]] if adapter_id else []


def _subject(request: generation_pb2.EmbedRequest) -> Subject:
    return Subject("loraplex.v1.Adapter", request.adapter_id)
