"""Nothing of a call is left when it has ended, however it ended and without garbage collection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from loraplex.v1 import adapter_pb2, generation_pb2
from loraplex_model.base.refusal import Refusal
from loraplex_server.rpc.calls import arriving
from rpc.harness import NONFINITE, Running, ask, rest, running, streamed

pytestmark = pytest.mark.fault("refused-calls-keep-memory")

GENERATE = "/loraplex.v1.GenerationService/Generate"
STREAM = "/loraplex.v1.GenerationService/GenerateStream"
ADAPTERS = "/loraplex.v1.AdapterService"
CALLS = 6


@pytest_asyncio.fixture
async def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setattr(arriving, "ARRIVAL_SECONDS", 0.1)
    async with running(tmp_path, engine_options={"step_seconds": 0.003}) as server:
        yield server


Ending = Callable[[Running], Awaitable[Any]]


def unary(method: str, request: Message | bytes, **options: Any) -> Ending:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return lambda up: up.channel.unary_unary(method)(data, **options)


def stream(request: Message, reads: int = 0, **options: Any) -> Ending:
    data = request.SerializeToString()

    async def end(up: Running) -> None:
        call = up.channel.unary_stream(STREAM)(data, **options)
        for _ in range(reads):
            await call.read()
        if reads:
            call.cancel()
        await rest(call)

    return end


def upload(*messages: adapter_pb2.UploadAdapterRequest, cancel: bool = False) -> Ending:
    parts = [message.SerializeToString() for message in messages]

    async def end(up: Running) -> None:
        call = up.channel.stream_unary(f"{ADAPTERS}/UploadAdapter")()
        for part in parts:
            await call.write(part)
        if cancel:
            await asyncio.sleep(0.02)
            call.cancel()
        else:
            await call.done_writing()
        await call

    return end


async def half_sent(up: Running) -> None:
    """A call whose only request does not arrive, until the server refuses it."""
    await up.channel.stream_unary(GENERATE)()


async def stream_of_nothing(up: Running) -> None:
    call = up.channel.stream_unary(GENERATE)()
    await call.done_writing()
    await call


async def watch(up: Running) -> None:
    call = up.channel.unary_stream(f"{ADAPTERS}/WatchAdapters")(b"")
    await call.read()
    call.cancel()
    await call.code()


UNKNOWN = adapter_pb2.UploadAdapterRequest(
    header={"upload_id": "0" * 32, "name": "a", "config_size": 9, "weights_size": 9}
)
ENDINGS: dict[str, Ending] = {
    "answered": unary(GENERATE, ask()),
    "invalid": unary(GENERATE, ask(priority=1000)),
    "beyond a bound": unary(GENERATE, ask(mix=[{"adapter_id": "a"}] * 9)),
    "malformed": unary(GENERATE, b"\xff" * 50),
    "not found": unary(GENERATE, ask(adapter="missing")),
    "too long": unary(GENERATE, generation_pb2.GenerateRequest(prompt="x " * 100_000)),
    "failed": unary(GENERATE, ask(20, NONFINITE)),
    "late": unary(GENERATE, ask(new=900), timeout=0.05),
    "an adapter call": unary(f"{ADAPTERS}/LoadAdapter", b"\x0a\x01a"),
    "a failed validation": unary(f"{ADAPTERS}/ValidateAdapter", b"\x0a\x01a"),
    "a disabled service": unary("/loraplex.v1.TrainingService/GetJob", b"\x0a\x01a"),
    "a refused stream": stream(streamed(ask(priority=1000))),
    "a cancelled stream": stream(streamed(ask(new=900)), reads=2),
    "a late stream": stream(streamed(ask(new=900)), timeout=0.05),
    "a failed stream": stream(streamed(ask(20, NONFINITE))),
    "a refused upload": upload(UNKNOWN),
    "a malformed upload": upload(UNKNOWN, UNKNOWN),
    "a cancelled upload": upload(cancel=True),
    "a watch": watch,
    "a request that does not arrive": half_sent,
    "no request": stream_of_nothing,
    "an unknown service": unary("/grpc.health.v1.Health/Check", b"\x0a\x01a"),
    "an unknown method": unary("/loraplex.v1.GenerationService/Missing", b""),
}


def remains() -> Counter[str]:
    """Objects of calls that are in memory, by their type."""
    found: Counter[str] = Counter()
    for each in gc.get_objects():
        kind = type(each)
        ours = isinstance(each, Message) and each.DESCRIPTOR.full_name.startswith("loraplex.")
        failed = isinstance(each, Refusal | grpc.aio.AbortError)
        if ours or failed or kind.__name__ in {"_ServicerContext", "RPCState", "_Call"}:
            found[kind.__name__] += 1
    return found


async def left_by(up: Running, ending: Ending) -> Counter[str]:
    """Objects that several calls with the same ending leave in memory."""

    async def calls() -> None:
        for _ in range(CALLS):
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await ending(up)
        await quiet(up)

    await calls()
    before = remains()
    await calls()
    return remains() - before


async def test_nothing_of_a_call_remains(up: Running) -> None:
    gc.collect()
    gc.freeze()  # objects of the test itself need not be counted
    gc.disable()
    try:
        left = {name: await left_by(up, ending) for name, ending in ENDINGS.items()}
    finally:
        gc.enable()
        gc.unfreeze()
    # The last call's objects may still be on their way out; those of all calls are not.
    kept = {name: many for name, many in left.items() if max(many.values(), default=0) > CALLS / 2}
    assert not kept


async def quiet(up: Running) -> None:
    """Waits until the server has finished what the calls began."""
    for _ in range(20):
        await asyncio.sleep(0.005)
