"""gRPC reflection with a limit on the calls, each of which a client may keep open."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.rpc.calls.arriving import SILENCE_SECONDS, messages
from loraplex_server.rpc.calls.gate import CallGate

MAX_REFLECTIONS: Final = 16


class ReflectionService:
    """grpcio's reflection of `services` and of itself."""

    def __init__(self, services: Iterable[str], gate: CallGate) -> None:
        self._answers = reflection.aio.ReflectionServicer((*services, reflection.SERVICE_NAME))
        self._gate = gate
        self._calls = 0

    async def ServerReflectionInfo(
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[Any, None]:
        """Answers each question. Raises Refusal: OVERLOADED, DRAINING, DEADLINE_EXCEEDED."""
        if self._calls >= MAX_REFLECTIONS:
            raise Refusal(Reason.OVERLOADED, f"{self._calls} calls are open; try again later")
        self._calls += 1
        try:
            silence = f"no question arrived for {SILENCE_SECONDS:g} s"
            questions = messages(
                request_iterator, self._gate, "the server is shutting down", silence
            )
            async with aclosing(questions):
                async for answer in self._answers.ServerReflectionInfo(questions, context):
                    yield answer
        finally:
            self._calls -= 1
