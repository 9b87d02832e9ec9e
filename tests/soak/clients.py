"""The clients of a soak: each is a loop until its time is over, and judges its own calls."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc, generation_pb2_grpc
from rpc.harness import ask, streamed
from soak.answers import Answers
from soak.judging import Verdict

HOSTILE = Path(__file__).resolve().parents[1] / "rpc" / "hostile_client.py"


@dataclass
class Stage:
    """What the clients share.

    Attributes:
        address: host:port of the server, which stays the same when it is started again.
        steady: names that nobody changes.
        changing: names that are registered, replaced and deleted all the time.
        history: the digests that a name has ever meant, or may mean already.
        folders: directories below the import root, by digest.
        end: time (`time.monotonic()`) at which clients stop.
        new: most tokens of an answer.
        merges: adapters are merged, too. The answers of a real model are rounded otherwise then, so
            that none of them could be called wrong.
    """

    address: str
    verdict: Verdict
    answers: Answers
    steady: Sequence[str]
    changing: Sequence[str]
    folders: dict[str, str]
    history: dict[str, set[str]] = field(default_factory=dict)
    end: float = 0.0
    new: int = 40
    merges: bool = True

    @property
    def over(self) -> bool:
        """Whether clients must stop."""
        return time.monotonic() >= self.end

    @asynccontextmanager
    async def stubs(self) -> AsyncIterator[Any]:
        """Stubs on a connection of their own."""
        options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.address, options) as channel:
            yield (
                generation_pb2_grpc.GenerationServiceStub(channel),
                adapter_pb2_grpc.AdapterServiceStub(channel),
            )


Client = Callable[[Stage, random.Random], Awaitable[None]]

_GONE = frozenset({"ADAPTER_NOT_FOUND", "ADAPTER_UNLOADED"})
_CHANGES = _GONE | {
    "ADAPTER_CONFLICT",
    "ADAPTER_TOO_LARGE",
    "MERGE_BUDGET",
    "MERGE_UNSUPPORTED",
    "PIN_BUDGET",
}


async def reader(stage: Stage, chance: random.Random) -> None:
    """Reads whole answers and compares every token with what it must be."""
    async with stage.stubs() as (generation, _):
        while not stage.over:
            await _generate(stage, chance, generation, "reader")


async def canceller(stage: Stage, chance: random.Random) -> None:
    """Cancels its streams after a few messages."""
    async with stage.stubs() as (generation, _):
        while not stage.over:
            await _generate(stage, chance, generation, "canceller", leave=chance.randint(0, 6))


async def hurrier(stage: Stage, chance: random.Random) -> None:
    """Sets deadlines that are often too short."""
    async with stage.stubs() as (generation, _):
        while not stage.over:
            seconds = chance.choice((0.001, 0.02, 0.2, 1.0))
            await _generate(stage, chance, generation, "hurrier", seconds=seconds)


async def slow_reader(stage: Stage, chance: random.Random) -> None:
    """Pauses between messages, but reads on."""
    async with stage.stubs() as (generation, _):
        while not stage.over:
            await _generate(stage, chance, generation, "slow reader", pause=0.05)


async def staller(stage: Stage, chance: random.Random) -> None:
    """Reads one message, then none for longer than the server puts up with."""
    async with stage.stubs() as (generation, _):
        while not stage.over:
            stalled = frozenset({"READER_STALLED"})
            await _generate(
                stage, chance, generation, "staller", pause=5.0, pauses=1, allowed=stalled
            )


async def vanisher(stage: Stage, chance: random.Random) -> None:
    """Closes its connection in the middle of several streams."""
    while not stage.over:
        async with stage.stubs() as (generation, _):
            calls = [
                generation.GenerateStream(streamed(_request(stage, chance)[0])) for _ in range(4)
            ]
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await asyncio.gather(*(call.read() for call in calls))
            await asyncio.sleep(chance.random() * 0.1)
        stage.verdict.outcomes["vanisher", "OK"] += len(calls)


async def hostile(stage: Stage, chance: random.Random) -> None:
    """Sends wrong messages, wrong frames and calls that are taken back at once."""
    while not stage.over:
        seconds = min(5.0, stage.end - time.monotonic())
        kind = chance.choice(("messages", "calls", "garbage", "resets"))
        arguments = (kind, stage.address, f"{seconds:.1f}", str(chance.randrange(1 << 30)))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(HOSTILE), *arguments),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await process.wait()
        stage.verdict.outcomes[f"hostile {kind}", "OK"] += 1
        await asyncio.sleep(2.0)


async def changer(stage: Stage, chance: random.Random) -> None:
    """Registers, replaces, deletes, restores, loads, unloads, pins and merges adapters."""
    async with stage.stubs() as (_, adapters):
        while not stage.over:
            began, name = time.monotonic(), chance.choice(stage.changing)
            try:
                await _change(stage, chance, adapters, name)
                stage.verdict.ended("changer", began)
            except grpc.aio.AioRpcError as error:
                stage.verdict.ended("changer", began, error, _CHANGES)
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.02)


async def _change(stage: Stage, chance: random.Random, adapters: Any, name: str) -> None:
    """One random change of a name."""
    seconds = 60.0
    match chance.randrange(12 if stage.merges else 10):
        case 0 | 1 | 2:
            digest = chance.choice(list(stage.folders))
            stage.history.setdefault(name, set()).add(digest)
            request = pb.RegisterAdapterRequest(
                name=name, path=stage.folders[digest], replace=True, load=chance.random() < 0.3
            )
            told = (await adapters.RegisterAdapter(request, timeout=seconds)).adapter
            if told.digest != digest:
                stage.verdict.wrong_answer("changer", f"{name} was registered as {told.digest}")
        case 3:
            await adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name), timeout=seconds)
        case 4:
            await adapters.RestoreAdapter(pb.RestoreAdapterRequest(name=name), timeout=seconds)
        case 5:
            await adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id=name), timeout=seconds)
        case 6:
            force = chance.random() < 0.3
            request = pb.UnloadAdapterRequest(adapter_id=name, force=force)
            await adapters.UnloadAdapter(request, timeout=seconds)
        case 7:
            await adapters.PinAdapter(pb.PinAdapterRequest(adapter_id=name), timeout=seconds)
        case 8:
            await adapters.UnpinAdapter(pb.UnpinAdapterRequest(adapter_id=name), timeout=seconds)
        case 10:
            await adapters.MergeAdapter(pb.MergeAdapterRequest(adapter_id=name), timeout=seconds)
        case 11:
            request = pb.UnmergeAdapterRequest(adapter_id=name)
            await adapters.UnmergeAdapter(request, timeout=seconds)
        case 9:
            await adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1000), timeout=seconds)


async def watcher(stage: Stage, chance: random.Random) -> None:
    """Watches the table of adapters, and begins again now and then."""
    async with stage.stubs() as (_, adapters):
        while not stage.over:
            began = time.monotonic()
            seconds = min(20.0, max(0.1, stage.end - began))
            try:
                async for _ in adapters.WatchAdapters(pb.WatchAdaptersRequest(), timeout=seconds):
                    pass
            except grpc.aio.AioRpcError as error:
                stage.verdict.ended("watcher", began, error)
                await asyncio.sleep(0.2)


def _request(stage: Stage, chance: random.Random) -> tuple[Any, tuple[int, ...], int]:
    """A request for the base, a steady or a changing adapter, or a mix of steady ones."""
    prompt = chance.choice(list(stage.answers.prompts()))
    count = chance.randint(1, stage.new)
    kind = chance.random()
    fields: dict[str, Any] = {}
    if kind < 0.4:
        fields["adapter"] = chance.choice(stage.steady)
    elif kind < 0.7 and stage.changing:
        fields["adapter"] = chance.choice(stage.changing)
    elif kind < 0.8:
        mixed = chance.sample(list(stage.steady), 2)
        fields["mix"] = [
            {"adapter_id": n, "weight": w} for n, w in zip(mixed, (0.5, -1.0), strict=True)
        ]
    request = ask(*prompt, new=count, stop={"ignore_eos": True}, **fields)
    return request, prompt, count


async def _generate(
    stage: Stage,
    chance: random.Random,
    generation: Any,
    client: str,
    *,
    leave: int | None = None,
    seconds: float = 60.0,
    pause: float = 0.0,
    pauses: int = 1000,
    allowed: frozenset[str] = frozenset(),
) -> None:
    """One stream, whose tokens are compared as they arrive."""
    request, prompt, count = _request(stage, chance)
    names = {request.adapter_id} if request.adapter_id in stage.changing else set()
    began = time.monotonic()
    call = generation.GenerateStream(streamed(request), timeout=seconds)
    got: list[int] = []
    right: list[int] | None = None
    messages = 0
    try:
        async for event in call:
            messages += 1
            if leave is not None and messages > leave:
                call.cancel()
                break
            if event.HasField("started"):
                mix = [(each.digest, each.weight) for each in event.started.adapters]
                _check_names(stage, client, event.started.adapters)
                right = stage.answers.right(prompt, mix, count)
            got += event.delta.token_ids
            if right is not None and got != right[: len(got)]:
                stage.verdict.wrong_answer(client, f"{prompt} with {mix}: {got}, not {right}")
                call.cancel()
                break
            if pause and pauses:
                pauses -= 1
                await asyncio.sleep(pause)
        else:
            if len(got) != count:
                stage.verdict.wrong_answer(client, f"{len(got)} of {count} tokens")
    except grpc.aio.AioRpcError as error:
        explained = allowed | (_GONE if names else frozenset())
        stage.verdict.ended(client, began, error, explained)
        await asyncio.sleep(0.02)
    else:
        stage.verdict.ended(client, began)
    stage.verdict.tokens += len(got)


def _check_names(stage: Stage, client: str, adapters: Any) -> None:
    for each in adapters:
        if each.digest not in stage.history.get(each.name, ()):
            stage.verdict.wrong_answer(client, f"{each.name} was never {each.digest}")


CLIENTS: dict[str, tuple[Client, int]] = {
    "reader": (reader, 12),
    "canceller": (canceller, 4),
    "hurrier": (hurrier, 3),
    "slow reader": (slow_reader, 2),
    "staller": (staller, 2),
    "vanisher": (vanisher, 2),
    "hostile": (hostile, 1),
    "changer": (changer, 2),
    "watcher": (watcher, 2),
}
"""The kinds of clients, and how many of each there are."""
