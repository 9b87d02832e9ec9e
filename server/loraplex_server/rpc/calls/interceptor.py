"""Wraps every call: who may make it, request id, log line, metrics, and the status of a failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import Message
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.access.audit_log.lines import AuditLog
from loraplex_server.access.principals import Principal
from loraplex_server.metrics import Metrics
from loraplex_server.rpc.calls.access import NOBODY, AccessCheck, Standing
from loraplex_server.rpc.calls.arriving import Arrivals
from loraplex_server.rpc.calls.call import OURS, CallRecords, ServedCall
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.intake import Intake, Reader
from loraplex_server.rpc.calls.remains import forget_after_call
from loraplex_server.rpc.calls.writing import StreamWriter

_GENERATION: Final = "/loraplex.v1.GenerationService/"
"""Service whose streams may finish after their caller's credential has ended."""

_CANCELLATION_SECONDS: Final = 0.1
"""Longest time between the end of a lost call's requests and its cancellation."""

_NO_REQUEST: Final = b"\xff"
"""Stands for a request that its client did not send: bytes that are not a valid message."""

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Behaviour: TypeAlias = "Callable[[Any, _Context], Awaitable[Message]]"
"""Takes the request, or an iterator of requests, and returns the reply."""

_StreamBehaviour: TypeAlias = "Callable[[Any, _Context], AsyncGenerator[Message, None]]"
"""Takes the same, and yields the replies."""


class CallPath:
    """What the calls of all addresses share: records, bounds on what arrives, and the writer.

    A stream is ended after `write_stall_seconds` in which its client does not read.
    """

    def __init__(
        self, gate: CallGate, metrics: Metrics, audit: AuditLog, write_stall_seconds: float
    ) -> None:
        self.records = CallRecords(gate, metrics, audit)
        self.arrivals = Arrivals(gate)
        self.intake = Intake()
        self.writer = StreamWriter(gate, write_stall_seconds)


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method at one address, and decodes its requests in place of gRPC.

    A call that is not allowed is refused before anything of its request is read.
    """

    def __init__(self, path: CallPath, access: AccessCheck) -> None:
        self._path = path
        self._access = access
        self._refusing: set[asyncio.Task[None]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """See grpc.aio.ServerInterceptor."""
        self._path.records.gate.arrive()
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        read: Reader = handler.request_deserializer
        # Single requests are read here as streams too: gRPC calls a handler of a single request
        # only once the request is complete, which may be never.
        make: Callable[..., _Handler] = grpc.stream_stream_rpc_method_handler
        guarded: Callable[[Any, _Context], Awaitable[Message | None]]
        if handler.unary_unary is not None:
            make = grpc.stream_unary_rpc_method_handler
            guarded = self._unary(method, handler.unary_unary, read)
        elif handler.stream_unary is not None:
            make = grpc.stream_unary_rpc_method_handler
            guarded = self._gathering(method, handler.stream_unary, read)
        elif handler.unary_stream is not None:
            guarded = self._stream(method, handler.unary_stream, read)
        else:
            guarded = self._conversation(method, handler.stream_stream, read)
        return make(guarded, None, handler.response_serializer)

    def _unary(self, method: str, behave: _Behaviour, read: Reader) -> _Behaviour:
        intake = self._path.intake

        async def guarded(requests: object, context: _Context) -> Message:
            principal = await self._admit(method, context)
            data = await self._request(method, context, principal)
            async with self._call(method, context, principal) as call:
                with intake.holding(len(data)):
                    request = call.check(await intake.decode(read, data))
                    return call.answered(await behave(request, context))

        return guarded

    def _gathering(self, method: str, behave: _Behaviour, read: Reader) -> _Behaviour:
        async def guarded(stream: AsyncIterator[bytes], context: _Context) -> Message:
            principal = await self._admit(method, context)
            standing = self._access.standing(method, context, principal)
            async with self._call(method, context, principal) as call:
                call.require_open()
                async with aclosing(self._requests(stream, call, read, standing)) as requests:
                    return call.answered(await behave(requests, context))

        return guarded

    def _stream(
        self, method: str, behave: _StreamBehaviour, read: Reader
    ) -> Callable[[Any, _Context], Awaitable[None]]:
        intake = self._path.intake

        async def guarded(requests: object, context: _Context) -> None:
            principal = await self._admit(method, context)
            data = await self._request(method, context, principal)
            async with self._call(method, context, principal) as call:
                with intake.holding(len(data)):
                    request = call.check(await intake.decode(read, data))
                    events = behave(request, context)
                    if not method.startswith(_GENERATION):
                        standing = self._access.standing(method, context, principal)
                        events = events if standing is None else standing.over(events)
                    await self._answer(call, events, context)

        return guarded

    def _conversation(
        self, method: str, behave: _StreamBehaviour, read: Reader
    ) -> Callable[[Any, _Context], Awaitable[None]]:
        async def guarded(stream: AsyncIterator[bytes], context: _Context) -> None:
            principal = await self._admit(method, context)
            standing = self._access.standing(method, context, principal)
            async with self._call(method, context, principal) as call:
                call.require_open()
                async with aclosing(self._requests(stream, call, read, standing)) as requests:
                    await self._answer(call, behave(requests, context), context)

        return guarded

    async def _admit(self, method: str, context: _Context) -> Principal:
        """The caller. Ends the call, with AbortError, if it is not allowed."""
        principal = NOBODY
        try:
            principal = self._access.identify(method, context)
            self._access.require(method, principal)
        except Exception as error:
            async with self._call(method, context, principal):
                raise error
        return principal

    def _call(self, method: str, context: _Context, principal: Principal) -> ServedCall:
        return ServedCall(self._path.records, method, context, principal)

    async def _requests(
        self,
        stream: AsyncIterator[bytes],
        call: ServedCall,
        read: Reader,
        standing: Standing | None,
    ) -> AsyncGenerator[Message, None]:
        """Yields the requests of a stream; raises Refusal as for a single request."""
        intake = self._path.intake
        arriving: Any = aiter(stream)
        # gRPC's generator refers to itself until it is closed.
        async with aclosing(arriving):
            async for data in arriving:
                if standing is not None:
                    standing.check()
                with intake.holding(len(data)):
                    yield call.check(await intake.decode(read, data))

    async def _request(self, method: str, context: _Context, principal: Principal) -> bytes:
        """Reads the only request of a call, which `Arrivals` refuses if it does not arrive."""
        refuse = partial(self._refuse, method, context, principal)
        key = self._path.arrivals.begin(refuse, drains=method.startswith(OURS))
        try:
            data: Any = await context.read()
        except grpc.aio.AbortError as refused:
            forget_after_call(refused)
            raise
        finally:
            self._path.arrivals.end(key)
        if data is not grpc.aio.EOF:
            return bytes(data)
        # Either the client has sent none, or the cancellation of a lost call is about to arrive.
        await asyncio.sleep(_CANCELLATION_SECONDS)
        return _NO_REQUEST

    def _refuse(
        self, method: str, context: _Context, principal: Principal, refusal: Refusal
    ) -> None:
        """Ends a call whose request is being read; the read then fails with the same AbortError."""

        async def fail() -> None:
            with contextlib.suppress(grpc.aio.BaseError):
                async with self._call(method, context, principal):
                    raise refusal

        task = asyncio.get_running_loop().create_task(fail())
        self._refusing.add(task)
        task.add_done_callback(self._refusing.discard)

    async def _answer(
        self, call: ServedCall, events: AsyncGenerator[Message, None], context: _Context
    ) -> None:
        # Closing the generator frees the request when the client is gone.
        async with aclosing(events):
            async for event in events:
                await self._path.writer.write(context, event, events, call.stall)
                if call.stalled:
                    raise Refusal(Reason.READER_STALLED, "the client stopped reading")
