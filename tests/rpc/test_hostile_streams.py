"""Clients that send half of a message, keep connections open, or never read what they asked for."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loraplex.v1 import adapter_pb2, generation_pb2_grpc, training_pb2
from rpc.harness import Running, ask, refusal, rest, running, streamed, until
from rpc.raw_http2 import DEFAULT_WINDOW, PREFACE, raw_connection
from rpc.training_jobs import order, settings

GENERATE = "/loraplex.v1.GenerationService/Generate"
STREAM = "/loraplex.v1.GenerationService/GenerateStream"
WATCH_ADAPTERS = "/loraplex.v1.AdapterService/WatchAdapters"
WATCH_JOB = "/loraplex.v1.TrainingService/WatchJob"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HALF = b"x" * 1000
ARRIVING = "loraplex_server.rpc.calls.arriving"


def refused(up: Running, method: str, code: str) -> float:
    return up.metric("requests_total", method=method, code=code)


@pytest.mark.fault("half-sent-messages")
@pytest.mark.parametrize("method", [GENERATE, STREAM, WATCH_ADAPTERS])
async def test_a_request_that_does_not_arrive_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(f"{ARRIVING}.ARRIVAL_SECONDS", 0.5)
    async with (
        running(tmp_path) as up,
        raw_connection(up.server.address, DEFAULT_WINDOW) as hostile,
    ):
        streams = {hostile.call(method, HALF, end=False), hostile.call(method)}
        await until(lambda: hostile.ended >= streams)
        name = method.rpartition("/")[2]
        await until(lambda: refused(up, name, "DEADLINE_EXCEEDED") == 2)
        assert (await up.generation.Generate(ask(new=1))).token_ids


@pytest.mark.fault("half-sent-messages")
async def test_a_call_that_ends_without_a_request_is_malformed(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        call = up.channel.stream_unary(GENERATE)(iter(()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 20)
        assert refusal(caught.value).reason == "REQUEST_MALFORMED"


@pytest.mark.fault("half-sent-messages")
async def test_the_oldest_of_too_many_half_sent_requests_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{ARRIVING}.MAX_HALF_SENT", 8)
    monkeypatch.setattr(f"{ARRIVING}.YOUNG_SECONDS", 0.0)
    async with (
        running(tmp_path) as up,
        raw_connection(up.server.address, DEFAULT_WINDOW) as hostile,
    ):
        # Each call is seen by the server before the next is sent: gRPC hands calls that arrive
        # together to the server in any order.
        calls = up.server._path.arrivals
        streams: list[int] = []
        for sent in range(50):
            streams.append(hostile.call(GENERATE, HALF, end=False))
            await until(lambda sent=sent: len(calls) + len(hostile.ended) == sent + 1)
        assert hostile.ended == set(streams[:42])
        assert refused(up, "Generate", "UNAVAILABLE") == 42
        assert (await up.generation.Generate(ask(new=1))).token_ids


@pytest.mark.fault("half-sent-messages")
async def test_a_burst_of_calls_is_not_taken_for_half_sent_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{ARRIVING}.MAX_HALF_SENT", 1)
    async with running(tmp_path) as up:
        calls = (up.generation.Generate(ask(new=1)) for _ in range(100))
        assert all(reply.token_ids for reply in await asyncio.gather(*calls))


@pytest.mark.fault("half-sent-messages")
@pytest.mark.fault("drain-unbounded")
async def test_half_sent_requests_end_with_the_drain(tmp_path: Path) -> None:
    async with (
        running(tmp_path, drain_timeout=600.0) as up,
        raw_connection(up.server.address, DEFAULT_WINDOW) as hostile,
    ):
        upload = "/loraplex.v1.AdapterService/UploadAdapter"
        methods = (GENERATE, STREAM, upload, REFLECT)
        streams = {hostile.call(method, HALF, end=False) for method in methods}
        await until(lambda: len(up.server._path.arrivals) == 2)
        await asyncio.wait_for(up.server.drain(), 20)
        await until(lambda: hostile.ended >= streams)


@pytest.mark.fault("drain-unbounded")
async def test_readers_that_have_stopped_do_not_hold_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_server.rpc.calls.writing.DRAIN_STALL_SECONDS", 0.5)
    slow = {"step_seconds": 0.003, "num_blocks": 1024}
    more = settings(tmp_path)
    async with (
        running(tmp_path, drain_timeout=600.0, engine_options=slow, **more) as up,
        raw_connection(up.server.address, window=0) as hostile,
    ):
        jobs = up.channel.unary_unary(
            "/loraplex.v1.TrainingService/CreateJob",
            request_serializer=training_pb2.CreateJobRequest.SerializeToString,
            response_deserializer=training_pb2.CreateJobResponse.FromString,
        )
        job = (await jobs(order("step 1", "hold"))).job
        watch_job = training_pb2.WatchJobRequest(job_id=job.job_id)
        hostile.call(STREAM, streamed(ask(new=900)).SerializeToString())
        hostile.call(WATCH_ADAPTERS, adapter_pb2.WatchAdaptersRequest().SerializeToString())
        hostile.call(WATCH_JOB, watch_job.SerializeToString())
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        hostile.call(REFLECT, question.SerializeToString())
        await until(lambda: up.metric("running_requests") == 1)
        # One that reads finishes meanwhile.
        stub = generation_pb2_grpc.GenerationServiceStub(up.channel)
        reading = stub.GenerateStream(streamed(ask(new=900)))
        await reading.read()
        draining = asyncio.create_task(up.server.drain())
        tokens = [t for e in await rest(reading) for t in e.delta.token_ids]
        assert len(tokens) > 800
        await asyncio.wait_for(draining, 30)
        await asyncio.wait_for(up.server.close(), 30)


@pytest.mark.fault("connections-unbounded")
async def test_connections_are_bounded_and_those_open_go_on(tmp_path: Path) -> None:
    async with running(tmp_path, max_connections=8) as up, AsyncExitStack() as stack:
        assert (await up.generation.Generate(ask(new=1))).token_ids
        hostile = [
            await stack.enter_async_context(raw_connection(up.server.address)) for _ in range(30)
        ]
        for connection in hostile:
            connection.send(PREFACE[:10])
            connection.follow()
        await until(lambda: sum(c.closed.is_set() for c in hostile) == 23)
        assert (await up.generation.Generate(ask(new=1))).token_ids
        for connection in hostile:
            connection.abort()
        async with grpc.aio.insecure_channel(str(up.server.address)) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            assert (await stub.Generate(ask(new=1), wait_for_ready=True)).token_ids


@pytest.mark.fault("connections-unbounded")
async def test_connections_that_do_nothing_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_server.rpc import server

    short = {"grpc.max_connection_idle_ms": 300, "grpc.server_handshake_timeout_ms": 300}
    assert short.keys() <= dict(server.OPTIONS).keys()
    options = {**dict(server.OPTIONS), **short}
    monkeypatch.setattr(server, "OPTIONS", tuple(options.items()))
    async with (
        running(tmp_path) as up,
        raw_connection(up.server.address) as silent,
        raw_connection(up.server.address) as half,
        raw_connection(up.server.address, DEFAULT_WINDOW) as idle,
        raw_connection(up.server.address, DEFAULT_WINDOW) as done,
    ):
        silent.follow()
        half.send(PREFACE)
        half.follow()
        stream = done.call(GENERATE, ask(new=1).SerializeToString())
        await until(lambda: stream in done.ended)
        for connection in (silent, half, idle, done):
            await asyncio.wait_for(connection.closed.wait(), 20)


@pytest.mark.fault("connections-unbounded")
async def test_open_reflections_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_server.rpc.services.reflection.MAX_REFLECTIONS", 2)
    async with running(tmp_path) as up:
        stub = reflection_pb2_grpc.ServerReflectionStub(up.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        calls = [stub.ServerReflectionInfo() for _ in range(2)]
        for call in calls:
            await call.write(question)
            assert (await call.read()).list_services_response.service
        third = stub.ServerReflectionInfo()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await third.read()
        assert refusal(caught.value).reason == "OVERLOADED"
        calls[0].cancel()
        await until(lambda: up.server._rpc._reflection._calls == 1)
        fourth = stub.ServerReflectionInfo()
        await fourth.write(question)
        assert (await fourth.read()).list_services_response.service
