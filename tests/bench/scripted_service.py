"""A generation service that answers by a script, in place of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from loraplex.v1 import generation_pb2 as pb
from loraplex.v1 import generation_pb2_grpc as pb_grpc


class Scripted(pb_grpc.GenerationServiceServicer):
    """Answers token by token, in pairs where it can; misbehaves for some adapter names."""

    def __init__(self) -> None:
        self.seen: list[pb.GenerateRequest] = []
        self.running = 0
        self.most_running = 0
        self.three_running = asyncio.Event()

    async def GenerateStream(
        self,
        request: pb.GenerateStreamRequest,
        context: grpc.aio.ServicerContext[pb.GenerateStreamRequest, pb.GenerateStreamResponse],
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        asked = request.request
        self.seen.append(asked)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if asked.adapter_id == "unknown":
                await context.abort(grpc.StatusCode.NOT_FOUND, "no such adapter")
            if asked.adapter_id == "stuck":
                await asyncio.Event().wait()
            if self.running == 3:
                self.three_running.set()
            if asked.adapter_id == "together":
                await self.three_running.wait()
            name = "other" if asked.adapter_id == "wrong" else asked.adapter_id
            served = [pb.ResolvedAdapter(name=name)] if name else []
            yield pb.GenerateStreamResponse(started=pb.GenerationStarted(adapters=served))
            left = asked.stop.max_new_tokens - (asked.adapter_id == "short")
            while left:
                await asyncio.sleep(0)  # lets the other streams run
                ids = [7] * min(2, left)
                left -= len(ids)
                yield pb.GenerateStreamResponse(delta=pb.GenerationDelta(token_ids=ids))
                yield pb.GenerateStreamResponse(delta=pb.GenerationDelta(text="late text"))
            yield pb.GenerateStreamResponse(finished=pb.GenerationFinished())
        finally:
            self.running -= 1


@asynccontextmanager
async def scripted() -> AsyncIterator[tuple[Scripted, str]]:
    service = Scripted()
    server = grpc.aio.server()
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
