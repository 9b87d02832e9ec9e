"""A gRPC server whose accept loop cannot be ended by a request.

grpcio (seen in 1.85) decodes the path of a call to an unknown method in that loop. A path that is
not UTF-8 raises there, which ends the loop: the server closes its port while its process lives.
Calls of known methods are not decoded there, because their names are registered with the server.
So every call that reaches this loop has an unknown method, and is answered here without reading its
path.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

UNKNOWN_METHOD = "Method not found!"
"""grpcio's message for an unknown method."""


def make_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """Like grpc.aio.server. Services must be added by generated code, which registers methods.

    Header values that are not UTF-8, and replies to clients that are gone, are not logged with a
    traceback each.
    """
    logging.getLogger(cygrpc.__name__).addFilter(_is_worth_logging)
    server: Any = grpc.aio.server(interceptors=interceptors, options=options)
    loop = asyncio.get_running_loop()
    server._server = _Accepting(loop, None, (), tuple(interceptors), tuple(options), None)
    return server  # type: ignore[no-any-return]


class _Accepting(cygrpc.AioServer):  # type: ignore[misc]
    """Answers calls of unknown methods apart from the others."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *arguments: Any) -> None:
        super().__init__(loop, *arguments)
        self._own_loop = loop

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """The next call of a registered method; without one, the end of all other calls."""
        if method is not None:
            return super()._make_request_call_future(method)  # type: ignore[no-any-return]
        return self._own_loop.create_task(self._refuse_unknown())

    async def _refuse_unknown(self) -> None:
        refusals: set[asyncio.Task[None]] = set()
        while True:
            state = await self._request_call()  # raises when the server is stopped
            refusal = self._own_loop.create_task(_refuse(state, self._own_loop))
            refusals.add(refusal)
            refusal.add_done_callback(refusals.discard)


async def _refuse(state: object, loop: asyncio.AbstractEventLoop) -> None:
    context = cygrpc._ServicerContext(state, None, None, loop)
    try:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, UNKNOWN_METHOD)
    except grpc.aio.AbortError as error:
        error.__traceback__ = None  # it refers to the call, which refers to the error
    except Exception as error:  # the client is gone
        logging.getLogger(__name__).debug("an unknown method could not be refused: %s", error)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    # Sending a reply fails if the client has reset the call after the handler returned.
    kind = record.exc_info[0] if record.exc_info else None
    if kind is not None and issubclass(kind, cygrpc.ExecuteBatchError):
        return False
    return not str(record.msg).startswith("Invalid encoding on")
