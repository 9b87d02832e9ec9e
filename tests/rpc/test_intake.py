"""Large requests are decoded one at a time, and all requests together hold a bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from loraplex.v1 import generation_pb2
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.rpc.calls.intake import SMALL_BYTES, Intake
from rpc.harness import ask, expected, refusal, running, streamed, until

pytestmark = pytest.mark.fault("event-loop-held")

LARGE = b"\x1a\x80\x80\x08" + b"x" * (2 * SMALL_BYTES)


def reader(events: list[str]) -> Callable[[bytes], Message]:
    def read(data: bytes) -> Message:
        events.append("decoded")
        return generation_pb2.GenerateRequest.FromString(data)

    return read


async def test_the_loop_turns_between_two_large_requests() -> None:
    intake, events = Intake(), []

    async def others() -> None:
        while events.count("decoded") < 5:
            events.append("others")
            await asyncio.sleep(0)

    decoding = [intake.decode(reader(events), LARGE) for _ in range(5)]
    await asyncio.gather(*decoding, others())
    decoded = [i for i, event in enumerate(events) if event == "decoded"]
    assert all("others" in events[a:b] for a, b in pairwise(decoded))


async def test_a_large_request_is_followed_by_a_pause_as_long_as_its_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("loraplex_server.rpc.calls.intake.time.perf_counter", lambda: now)
    pauses: list[float] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda s, release: pauses.append(s) or release())

    def slow(data: bytes) -> Message:
        nonlocal now
        now += 7.0
        return generation_pb2.GenerateRequest()

    await asyncio.wait_for(Intake().decode(slow, LARGE), None)
    assert pauses == [7.0]


async def test_small_requests_do_not_wait_for_large_ones() -> None:
    intake, events = Intake(), []
    assert intake._turn.locked() is False
    await intake._turn.acquire()
    waiting = asyncio.ensure_future(intake.decode(reader(events), LARGE))
    await asyncio.sleep(0)
    await intake.decode(reader(events), ask().SerializeToString())
    assert events == ["decoded"]
    intake._turn.release()
    await waiting


async def test_what_cannot_be_decoded_does_not_stop_the_next_one() -> None:
    intake = Intake()
    for _ in range(3):
        with pytest.raises(Refusal) as caught:
            await intake.decode(generation_pb2.GenerateRequest.FromString, b"\xff" * len(LARGE))
        assert caught.value.reason is Reason.REQUEST_MALFORMED


def test_the_bytes_of_all_requests_are_bounded() -> None:
    intake = Intake(100)
    with intake.holding(1000), pytest.raises(Refusal) as caught, intake.holding(1):
        pass
    assert caught.value.reason is Reason.OVERLOADED
    with intake.holding(60), intake.holding(40):
        pass
    with intake.holding(60), pytest.raises(Refusal), intake.holding(41):
        pass
    with intake.holding(100):
        pass


async def test_too_many_bytes_are_refused_at_once_and_the_running_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_server.rpc.calls.interceptor.Intake", lambda: Intake(5000))
    async with running(tmp_path, engine_options={"step_seconds": 0.003}) as up:
        running_call = up.generation.GenerateStream(streamed(ask(new=200)))
        await running_call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.channel.unary_unary("/loraplex.v1.GenerationService/Generate")(LARGE)
        assert refusal(caught.value).reason == "OVERLOADED"
        assert list((await up.generation.Generate(ask(new=5))).token_ids) == expected(
            [20, 21, 22], 5
        )
        running_call.cancel()
        ended = {"method": "GenerateStream", "code": "CANCELLED"}
        await until(lambda: up.metric("requests_total", **ended) == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.channel.unary_unary("/loraplex.v1.GenerationService/Generate")(LARGE)
        assert refusal(caught.value).reason != "OVERLOADED"


async def test_a_server_measures_the_lag_of_its_loop(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await until(lambda: up.metric("event_loop_lag_seconds_count") > 0)
