"""Wraps every call: request id, log line, metrics, and the status of a failure.

No exception's text leaves the server. A handler raises `Refusal`; anything else becomes an
internal error. The client gets the request id, under which the log has the details.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final, Self, TypeAlias

import grpc
from google.protobuf.message import Message
from loraplex_model.base.refusal import PRINCIPAL_PREFIX, Reason, Refusal

from loraplex_server.access.principals import EVERYBODY, reset_caller, set_caller
from loraplex_server.logs import REQUEST_ID
from loraplex_server.metrics import Metrics
from loraplex_server.rpc.calls.arriving import Arrivals
from loraplex_server.rpc.calls.bounds import beyond_bounds
from loraplex_server.rpc.calls.errors import TABLE, require, status_of, trailers_of
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.ids import is_request_id
from loraplex_server.rpc.calls.intake import Intake, Reader
from loraplex_server.rpc.calls.remains import forget_after_call
from loraplex_server.rpc.calls.writing import StreamWriter

log = logging.getLogger(__name__)

_OURS: Final = "/loraplex.v1."
_CLOCK_SLACK: Final = 0.02
"""Seconds before its deadline at which a client's cancellation still counts as the deadline."""

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


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method, and decodes its requests in place of gRPC.

    A stream is ended after `write_stall_seconds` in which its client does not read.
    """

    def __init__(self, gate: CallGate, metrics: Metrics, write_stall_seconds: float) -> None:
        self._gate = gate
        self._metrics = metrics
        self.arrivals = Arrivals(gate)
        self._intake = Intake()
        self._writer = StreamWriter(gate, write_stall_seconds)
        self._refusing: set[asyncio.Task[None]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """See grpc.aio.ServerInterceptor."""
        self._gate.arrive()
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
        async def guarded(requests: object, context: _Context) -> Message:
            data = await self._request(method, context)
            async with _Call(self._gate, self._metrics, method, context) as call:
                with self._intake.holding(len(data)):
                    request = call.check(await self._intake.decode(read, data))
                    return await behave(request, context)

        return guarded

    def _gathering(self, method: str, behave: _Behaviour, read: Reader) -> _Behaviour:
        async def guarded(stream: AsyncIterator[bytes], context: _Context) -> Message:
            async with _Call(self._gate, self._metrics, method, context) as call:
                call.require_open()
                async with aclosing(self._requests(stream, call, read)) as requests:
                    return await behave(requests, context)

        return guarded

    def _stream(
        self, method: str, behave: _StreamBehaviour, read: Reader
    ) -> Callable[[Any, _Context], Awaitable[None]]:
        async def guarded(requests: object, context: _Context) -> None:
            data = await self._request(method, context)
            async with _Call(self._gate, self._metrics, method, context) as call:
                with self._intake.holding(len(data)):
                    request = call.check(await self._intake.decode(read, data))
                    await self._answer(call, behave(request, context), context)

        return guarded

    def _conversation(
        self, method: str, behave: _StreamBehaviour, read: Reader
    ) -> Callable[[Any, _Context], Awaitable[None]]:
        async def guarded(stream: AsyncIterator[bytes], context: _Context) -> None:
            async with _Call(self._gate, self._metrics, method, context) as call:
                call.require_open()
                async with aclosing(self._requests(stream, call, read)) as requests:
                    await self._answer(call, behave(requests, context), context)

        return guarded

    async def _requests(
        self, stream: AsyncIterator[bytes], call: _Call, read: Reader
    ) -> AsyncGenerator[Message, None]:
        """Yields the requests of a stream; raises Refusal as for a single request."""
        arriving: Any = aiter(stream)
        # gRPC's generator refers to itself until it is closed.
        async with aclosing(arriving):
            async for data in arriving:
                with self._intake.holding(len(data)):
                    yield call.check(await self._intake.decode(read, data))

    async def _request(self, method: str, context: _Context) -> bytes:
        """Reads the only request of a call, which `Arrivals` refuses if it does not arrive."""
        refuse = partial(self._refuse, method, context)
        key = self.arrivals.begin(refuse, drains=method.startswith(_OURS))
        try:
            data: Any = await context.read()
        except grpc.aio.AbortError as refused:
            forget_after_call(refused)
            raise
        finally:
            self.arrivals.end(key)
        if data is not grpc.aio.EOF:
            return bytes(data)
        # Either the client has sent none, or the cancellation of a lost call is about to arrive.
        await asyncio.sleep(_CANCELLATION_SECONDS)
        return _NO_REQUEST

    def _refuse(self, method: str, context: _Context, refusal: Refusal) -> None:
        """Ends a call whose request is being read; the read then fails with the same AbortError."""

        async def fail() -> None:
            with contextlib.suppress(grpc.aio.BaseError):
                async with _Call(self._gate, self._metrics, method, context):
                    raise refusal

        task = asyncio.get_running_loop().create_task(fail())
        self._refusing.add(task)
        task.add_done_callback(self._refusing.discard)

    async def _answer(
        self, call: _Call, events: AsyncGenerator[Message, None], context: _Context
    ) -> None:
        # Closing the generator frees the request when the client is gone.
        async with aclosing(events):
            async for event in events:
                await self._writer.write(context, event, events, call.stall)
                if call.stalled:
                    raise Refusal(Reason.READER_STALLED, "the client stopped reading")


class _Call:
    """One call: its id, the status of its failure, and the log line and metrics of its end."""

    def __init__(self, gate: CallGate, metrics: Metrics, method: str, context: _Context) -> None:
        self.id = uuid.uuid4().hex
        self._gate = gate
        self._metrics = metrics
        self._context = context
        self._ours = method.startswith(_OURS)
        self._method = method.rpartition("/")[2]
        self._code = grpc.StatusCode.OK
        self._reason = ""
        self._began = time.monotonic()
        self._counted = False
        self._admitted = False
        self.stalled = False
        """Whether the request was ended because its client does not read."""

    async def __aenter__(self) -> Self:
        self._token = REQUEST_ID.set(self.id)
        self._caller = set_caller(EVERYBODY)
        if self._ours:
            self._gate.enter()
            self._counted = True
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._context.set_trailing_metadata((("x-request-id", self.id),))
            else:
                forget_after_call(error)
                await self._fail(error)
        finally:
            self._leave()
            if self._ours:
                self._report(time.monotonic() - self._began)
            reset_caller(self._caller)
            REQUEST_ID.reset(self._token)

    def stall(self) -> None:
        """Ends the work for a client that does not read. A drain does not wait for its call."""
        log.warning("the client stopped reading", extra={"request_id": self.id})
        self.stalled = True
        self._leave()

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._gate.leave()

    def _report(self, seconds: float) -> None:
        self._metrics.rpc_ended(self._method, self._code.name, seconds, self._reason)
        extra = {"method": self._method, "code": self._code.name, "seconds": round(seconds, 4)}
        if self._reason:
            extra["reason"] = self._reason
        log.info("call ended", extra=extra)

    def check(self, request: Message) -> Message:
        """Takes the request's id and returns the request.

        Raises Refusal if a field is beyond its bounds or the server is draining.
        """
        if given := _given_id(request):
            self.id = given
            REQUEST_ID.set(given)
        if self._ours:
            self.require_open()
            require(beyond_bounds(request))
        return request

    def require_open(self) -> None:
        """Raises Refusal if the server is draining, or too short of memory for the call."""
        if self._ours and self._gate.draining:
            raise Refusal(Reason.DRAINING, "the server is shutting down")
        if self._ours and not self._admitted:  # once: a stream that has begun is not cut
            self._gate.require_memory(self._method)
            self._admitted = True

    async def _fail(self, error: BaseException) -> None:
        """Ends the call with the error's status. Returns only if there is no status to send."""
        gone = isinstance(error, grpc.aio.InternalError)  # what operations on its call then raise
        if gone or isinstance(error, asyncio.CancelledError):
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= _CLOCK_SLACK
            self._code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            if self.stalled:
                self._reason = Reason.READER_STALLED.name
            elif late:
                self._reason = Reason.DEADLINE_EXCEEDED.name
            if gone:
                raise asyncio.CancelledError from error
            return
        if isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception):
            return
        if not (isinstance(error, Refusal) and error.reason in TABLE):
            log.error("a handler failed", exc_info=error)
            error = Refusal(Reason.ENGINE_FAULT, "internal error")
        self._code = TABLE[error.reason].code
        self._reason = error.reason.name
        if error.reason is Reason.QUOTA_EXCEEDED:
            name = error.subject.name.removeprefix(PRINCIPAL_PREFIX)
            self._metrics.principals.quota_refused(name, error.field)
        status = status_of(error, self.id)
        trailers = trailers_of(status, error, self.id)
        try:
            await self._context.abort(self._code, status.message, trailers)
        except grpc.aio.InternalError as failed:  # the client is gone
            raise asyncio.CancelledError from failed
        except grpc.aio.AbortError as aborted:
            forget_after_call(aborted)
            raise


def _given_id(request: Any) -> str:
    given = getattr(request, "request_id", "") or getattr(
        getattr(request, "request", None), "request_id", ""
    )
    return given if isinstance(given, str) and is_request_id(given) else ""
