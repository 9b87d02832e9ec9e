"""Clients that die, dawdle or lie, and an engine that dies: only the guilty request suffers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loraplex.v1 import adapter_pb2, generation_pb2, generation_pb2_grpc
from loraplex_server.rpc.server import SERVICES
from loraplex_server.rpc.services.adapters import AdapterService
from rpc.harness import (
    EOS,
    SCRIPT,
    Running,
    ask,
    expected,
    make_tokenizer,
    refusal,
    rest,
    running,
    slow_channel,
    streamed,
    until,
)

SLOW = {"step_seconds": 0.003, "num_blocks": 1024}


def at_rest(up: Running) -> bool:
    """Nothing is held for any request: not in the front, not in the engine."""
    front = ("queue_depth", "queued_tokens", "running_requests")
    stats = up.server.engine.stats
    return (
        all(up.metric(name) == 0 for name in front)
        and up.metric("kv_blocks", state="used") == 0
        and (stats is None or stats.running + stats.waiting == 0)
        and all(adapter.refs == 0 for adapter in up.server.engine.adapters.values())
    )


async def test_a_cancelled_call_frees_everything(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        await up.register("alpha")
        calls = [
            up.generation.GenerateStream(streamed(ask(new=900, adapter=name)))
            for name in ("alpha", "", "alpha")
        ]
        for call in calls:
            await call.read()
        assert up.metric("running_requests") == 3
        for call in calls:
            call.cancel()
        await until(lambda: at_rest(up))
        ended = {"method": "GenerateStream", "code": "CANCELLED"}
        await until(lambda: up.metric("requests_total", **ended) == 3)


async def test_a_killed_client_frees_everything(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        program = (
            "import grpc, sys\n"
            "from loraplex.v1 import generation_pb2 as pb, generation_pb2_grpc as rpc\n"
            "stub = rpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
            "request = pb.GenerateRequest(token_ids={'ids': [20, 21]},"
            " sampling={'temperature': 0}, stop={'max_new_tokens': 900})\n"
            "for _ in stub.GenerateStream(pb.GenerateStreamRequest(request=request)):\n"
            "    print('reading', flush=True)\n"
        )
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(up.server.address), stdout=asyncio.subprocess.PIPE
        )
        assert client.stdout is not None
        await client.stdout.readline()
        assert up.metric("running_requests") == 1
        client.kill()
        await client.wait()
        await until(lambda: at_rest(up))


async def test_an_expired_deadline_frees_everything(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(new=900), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: at_rest(up))
        ended = {"method": "Generate", "code": "DEADLINE_EXCEEDED"}
        await until(lambda: up.metric("requests_total", **ended) == 1)


async def test_a_full_queue_refuses_at_once_and_the_running_go_on(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW, max_running=2, max_waiting=3) as up:
        calls = [up.generation.Generate(ask(20, i, new=60)) for i in range(30, 70)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        answered = [i for i, r in zip(range(30, 70), results, strict=True) if not is_error(r)]
        refused = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
        assert 5 <= len(answered) < 40
        assert {refusal(r).reason for r in refused} == {"OVERLOADED"}
        for i, reply in zip(range(30, 70), results, strict=True):
            if i in answered:
                assert list(reply.token_ids) == expected([20, i], 60)
        await until(lambda: at_rest(up))


def is_error(result: Any) -> bool:
    return isinstance(result, BaseException)


async def test_waiting_prompt_tokens_are_bounded(tmp_path: Path) -> None:
    async with running(
        tmp_path, engine_options={**SLOW, "step_seconds": 0.2}, max_waiting_tokens=100
    ) as up:
        first = asyncio.ensure_future(up.generation.Generate(ask(*[20] * 90, new=1)))
        await until(lambda: up.metric("queued_tokens") == 90)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(*[20] * 20, new=1))
        assert refusal(caught.value).reason == "OVERLOADED"
        assert len((await first).token_ids) == 1


async def test_a_slow_reader_is_reaped_and_harms_nobody(tmp_path: Path) -> None:
    async with (
        running(tmp_path, engine_options=SLOW, write_stall_timeout=0.2) as up,
        slow_channel(up) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stuck = stub.GenerateStream(streamed(ask(new=900, logprobs=20)))
        await stuck.read()
        reply = await up.generation.Generate(ask(new=20))
        assert list(reply.token_ids) == expected([20, 21, 22], 20)
        await until(lambda: at_rest(up))
        stuck.cancel()
        reaped = {"reason": "READER_STALLED"}
        await until(lambda: up.metric("rejected_requests_total", **reaped) == 1)


async def test_what_is_no_request_is_refused_and_nothing_of_it_is_told(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        bad_utf8 = b"\x0a\x02\xff\xfe"
        for method in ("GenerationService/Generate", "AdapterService/GetAdapter"):
            for data in (bad_utf8, b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await up.channel.unary_unary(f"/loraplex.v1.{method}")(data)
                assert refusal(caught.value).reason == "REQUEST_MALFORMED"
                assert caught.value.details() == "malformed request"
        stream = up.channel.unary_stream("/loraplex.v1.GenerationService/GenerateStream")(bad_utf8)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(stream)
        assert refusal(caught.value).reason == "REQUEST_MALFORMED"


async def test_a_message_of_5_mib_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        request = ask()
        request.prompt = "x" * (5 << 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        request.prompt = "x" * ((4 << 20) - 100)
        assert (await up.generation.Generate(ask(new=1))).token_ids


async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        request = ask()
        request.prompt = "x " * (1 << 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(request)
        assert refusal(caught.value).reason == "PROMPT_TOO_LONG"


async def test_a_chat_that_the_template_refuses_is_the_callers_fault(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        request = ask()
        for role in ("user", "system"):
            request.messages.messages.add(role=role, content="hello")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(request)
        seen = refusal(caught.value)
        assert seen.reason == "FIELD_INVALID"
        assert "the system speaks first" in seen.message


async def test_no_exceptions_text_leaves_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as up:

        def leak(*_: object) -> None:
            raise RuntimeError("secret /etc/passwd")

        monkeypatch.setattr("loraplex_server.rpc.services.completions.call.references", leak)
        monkeypatch.setattr(AdapterService, "_describe", leak)
        stream = up.generation.GenerateStream(streamed(ask(request_id="my-id")))
        calls = [
            up.generation.Generate(ask(request_id="my-id")),
            rest(stream),
            up.register("alpha"),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            seen = refusal(caught.value)
            assert seen.code is grpc.StatusCode.INTERNAL
            assert seen.message == "internal error"
            assert "secret" not in repr(caught.value)
            assert "secret" not in repr(seen)
        assert "secret /etc/passwd" in caplog.text  # the operator is told
        info = seen.detail(error_details_pb2.ErrorInfo)
        assert info.metadata["request_id"] == seen.trailers["x-request-id"]
        monkeypatch.undo()
        assert (await up.generation.Generate(ask(new=1))).token_ids


async def test_unloading_waits_for_the_streams_that_use_the_adapter(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        adapter = await up.register("alpha", load=True)
        assert adapter.state == adapter_pb2.ADAPTER_STATE_RESIDENT
        assert adapter.device_bytes > 0
        stream = up.generation.GenerateStream(streamed(ask(new=100, adapter="alpha")))
        await stream.read()
        unload = adapter_pb2.UnloadAdapterRequest(adapter_id="alpha")
        unloading = asyncio.ensure_future(up.adapters.UnloadAdapter(unload))
        tokens = [t for event in await rest(stream) for t in event.delta.token_ids]
        assert tokens == expected([20, 21, 22], 100, adapter.digest)
        unloaded = (await unloading).adapter
        assert unloaded.state == adapter_pb2.ADAPTER_STATE_STORED
        assert unloaded.device_bytes == 0
        # Using it brings it back.
        reply = await up.generation.Generate(ask(new=4, adapter="alpha"))
        assert list(reply.token_ids) == expected([20, 21, 22], 4, adapter.digest)


async def test_a_running_stream_keeps_its_digest_when_the_name_moves(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        old = await up.register("alpha", 1)
        stream = up.generation.GenerateStream(streamed(ask(new=150, adapter="alpha")))
        await stream.read()
        new = await up.register("alpha", 2, replace=True)
        reply = await up.generation.Generate(ask(new=10, adapter="alpha"))
        assert list(reply.token_ids) == expected([20, 21, 22], 10, new.digest)
        tokens = [t for event in await rest(stream) for t in event.delta.token_ids]
        assert tokens == expected([20, 21, 22], 150, old.digest)


async def test_a_stream_outlives_the_deletion_of_its_adapter(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        adapter = await up.register("alpha")
        stream = up.generation.GenerateStream(streamed(ask(new=100, adapter="alpha")))
        await stream.read()
        await up.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="alpha"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(adapter="alpha"))
        assert refusal(caught.value).reason == "ADAPTER_NOT_FOUND"
        tokens = [t for event in await rest(stream) for t in event.delta.token_ids]
        assert tokens == expected([20, 21, 22], 100, adapter.digest)
        labels = {"adapter": "alpha", "code": "OK"}
        assert up.metric("adapter_requests_total", **labels) == 0  # a deleted name is no label
        assert up.metric("adapter_requests_total", **{**labels, "adapter": "_other"}) == 1


async def test_an_engine_killed_under_load_costs_only_what_ran(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        adapter = await up.register("alpha", load=True)
        health = health_pb2_grpc.HealthStub(up.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        streams = [
            up.generation.GenerateStream(streamed(ask(20 + i, new=500, adapter=name)))
            for i, name in enumerate(("alpha", "", "alpha", ""))
        ]
        for stream in streams:
            await stream.read()
        assert up.server.engine.pid is not None
        os.kill(up.server.engine.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(stream)
            seen = refusal(caught.value)
            assert seen.code is grpc.StatusCode.UNAVAILABLE
            assert seen.reason == "ENGINE_RESTARTED"
            assert seen.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        reply = await up.generation.Generate(ask(new=10, adapter="alpha"))
        assert list(reply.token_ids) == expected([20, 21, 22], 10, adapter.digest)
        assert up.metric("engine_restarts_total") == 1
        await until(lambda: at_rest(up))


async def test_reflection_names_both_services(tmp_path: Path) -> None:
    async def names(up: Running) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(up.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [a async for a in stub.ServerReflectionInfo(iter([question]))]
        return {service.name for service in answer.list_services_response.service}

    async with running(tmp_path / "with") as up:
        assert set(SERVICES) <= await names(up)
    async with running(tmp_path / "without", reflection=False) as up:
        # Nothing is sent: the refusal may come first, and a write after it fails by itself.
        call = reflection_pb2_grpc.ServerReflectionStub(up.channel).ServerReflectionInfo()
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_unknown_methods_are_unimplemented(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.channel.unary_unary("/loraplex.v1.GenerationService/Nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_stop_string_ends_the_answer_and_frees_the_row(tmp_path: Path) -> None:
    words = "the quick fox stops at the end of the dog"
    script = make_tokenizer().encode(words).ids
    async with running(tmp_path, script=script, engine_options=SLOW) as up:
        request = ask(20, SCRIPT, new=600, stop={"strings": ["at the end", "cat"]})
        reply = await up.generation.Generate(request)
        assert reply.text == "the quick fox stops "
        assert reply.finish_reason == generation_pb2.FINISH_REASON_STOP
        assert reply.usage.completion_tokens == len(reply.token_ids)
        assert list(reply.token_ids) == script[: len(reply.token_ids)]
        await until(lambda: at_rest(up))
        events = await rest(up.generation.GenerateStream(streamed(request)))
        assert "".join(event.delta.text for event in events) == reply.text
        # What only began like a stop string is not lost.
        request.stop.strings[:] = ["at the end!"]
        request.stop.max_new_tokens = len(script)
        reply = await up.generation.Generate(request)
        assert reply.text == words
        assert reply.finish_reason == generation_pb2.FINISH_REASON_LENGTH


async def test_eos_and_stop_tokens_end_the_answer(tmp_path: Path) -> None:
    async with running(tmp_path, script=[30, 31, EOS, 32, 33]) as up:
        reply = await up.generation.Generate(ask(20, SCRIPT, new=5))
        assert list(reply.token_ids) == [30, 31]
        assert reply.finish_reason == generation_pb2.FINISH_REASON_STOP
        reply = await up.generation.Generate(ask(20, SCRIPT, new=5, stop={"ignore_eos": True}))
        assert list(reply.token_ids) == [30, 31, EOS, 32, 33]
        stop = {"ignore_eos": True, "token_ids": [32]}
        reply = await up.generation.Generate(ask(20, SCRIPT, new=5, stop=stop))
        assert list(reply.token_ids) == [30, 31, EOS]
