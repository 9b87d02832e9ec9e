"""A call's trace says where its time went, across client, front and engine, and nothing it said."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from loraplex import AsyncClient, Client
from loraplex.v1 import adapter_pb2, generation_pb2
from opentelemetry.sdk.trace import TracerProvider
from rpc.harness import FAULT, Running, ask, running, streamed, write_adapter
from telemetry.collector import Collector, Span, collecting, values

from deploy import live

SERVER = Span.SpanKind.SPAN_KIND_SERVER
ERROR = 2
PHASES = ["prepare", "adapter load", "queue", "prefill", "decode"]
VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collecting() as started:
        yield started


def traced(collector: Collector, **settings: object) -> dict[str, object]:
    return {"otlp_endpoint": collector.endpoint, **settings}


async def call_of(collector: Collector, method: str, number: int = 1) -> Span:
    return (await asyncio.to_thread(collector.call, method, number))[number - 1]


def test_one_trace_covers_client_front_and_engine(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=collectors")
    write_adapter(tmp_path / "import" / "alpha", 1)
    tracer = TracerProvider().get_tracer("caller")
    with (
        live.server(tmp_path, **traced(collector)) as server,
        Client(server.target, timeout=30.0) as client,
    ):
        client.register_adapter("alpha", "alpha")
        with tracer.start_as_current_span("caller") as caller:
            for _ in client.stream("the quick brown fox", adapter="alpha", max_new_tokens=5):
                pass
            client.generate("the lazy dog", adapter="alpha", max_new_tokens=5, temperature=0.0)
        context = caller.get_span_context()
        (first,) = collector.call("GenerateStream")
        (second,) = collector.call("Generate")
        (alone,) = collector.call("RegisterAdapter")
    for span in (first, second):
        assert int.from_bytes(span.trace_id, "big") == context.trace_id
        assert int.from_bytes(span.parent_span_id, "big") == context.span_id
        assert span.kind == SERVER
    assert alone.parent_span_id == b""
    assert int.from_bytes(alone.trace_id, "big") != context.trace_id
    phases = collector.children(first)
    assert sorted(phases) == sorted(PHASES)
    assert "adapter load" not in collector.children(second), "it was on the device already"
    for span in (first, second):
        children = collector.children(span)
        ordered = [children[name] for name in PHASES if name in children]
        assert ordered[0].start_time_unix_nano >= span.start_time_unix_nano
        assert ordered[-1].end_time_unix_nano <= span.end_time_unix_nano
        for before, after in itertools.pairwise(ordered):
            assert before.end_time_unix_nano == pytest.approx(after.start_time_unix_nano, abs=1e4)
            assert after.end_time_unix_nano >= after.start_time_unix_nano
            assert after.trace_id == span.trace_id
    assert collector.resource["service.name"] == "loraplex"
    assert collector.metadata[0]["x-token"] == "collectors"


async def test_a_span_has_the_conventions_attributes(collector: Collector, tmp_path: Path) -> None:
    async with running(tmp_path, **traced(collector)) as up:
        digest = (await up.register("alpha", 1)).digest
        request = ask(*range(20, 40), new=3, adapter="alpha", request_id="find-me")
        request.sampling.MergeFrom(generation_pb2.SamplingParams(top_k=7, seed=2**64 - 1))
        await up.generation.Generate(request)
        await up.generation.Generate(request)
        span = await call_of(collector, "Generate", 2)
        found = values(span.attributes)
        assert found.pop("gen_ai.response.time_to_first_chunk") > 0
        assert found == {
            "rpc.system": "grpc",
            "rpc.service": "loraplex.v1.GenerationService",
            "rpc.method": "Generate",
            "rpc.grpc.status_code": 0,
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "loraplex",
            "gen_ai.request.model": "alpha",
            "gen_ai.request.stream": False,
            "gen_ai.request.temperature": 0.0,
            "gen_ai.request.top_k": 7.0,
            "gen_ai.request.max_tokens": 3,
            "gen_ai.output.type": "text",
            "gen_ai.response.model": "alpha@1",
            "gen_ai.response.finish_reasons": ["length"],
            "gen_ai.usage.input_tokens": 20,
            "gen_ai.usage.cache_read.input_tokens": 16,
            "gen_ai.usage.output_tokens": 3,
            "loraplex.adapter.digests": [digest],
            "loraplex.request_id": "find-me",
        }
        chat = generation_pb2.GenerateRequest(stop={"max_new_tokens": 1})
        chat.messages.messages.add(role="user", content="the")
        stream = up.generation.GenerateStream(streamed(chat))
        async for _ in stream:
            pass
        found = values((await call_of(collector, "GenerateStream")).attributes)
        assert found["gen_ai.operation.name"] == "chat"
        assert found["gen_ai.request.stream"] is True
        assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "oracle"
        mix = ask(new=1, mix=[{"adapter_id": "alpha"}, {"adapter_id": "alpha@1"}])
        await up.generation.Generate(mix)
        span = await call_of(collector, "Generate", 3)
        assert values(span.attributes)["gen_ai.request.model"] == "alpha+alpha@1"


async def test_a_failed_call_says_why(collector: Collector, tmp_path: Path) -> None:
    async with running(tmp_path, **traced(collector)) as up:

        async def failed(request: generation_pb2.GenerateRequest, number: int) -> Span:
            with pytest.raises(grpc.aio.AioRpcError):
                await up.generation.Generate(request)
            return await call_of(collector, "Generate", number)

        unknown = await failed(ask(adapter="unknown"), 1)
        assert values(unknown.attributes)["error.type"] == "ADAPTER_NOT_FOUND"
        assert values(unknown.attributes)["rpc.grpc.status_code"] == 5
        assert unknown.status.code != ERROR, "the client's error, not the server's"
        assert not collector.children(unknown)
        fault = await failed(ask(FAULT), 2)
        assert values(fault.attributes)["error.type"] == "ENGINE_FAULT"
        assert (fault.status.code, fault.status.message) == (ERROR, "ENGINE_FAULT")
        assert set(collector.children(fault)) == {"prepare", "queue"}


async def test_a_cancelled_call_ends_its_span(collector: Collector, tmp_path: Path) -> None:
    slow = {"step_seconds": 0.01, "num_blocks": 400}
    async with running(tmp_path, **traced(collector, engine_options=slow)) as up:
        stream = up.generation.GenerateStream(streamed(ask(new=900)))
        await stream.read()
        stream.cancel()
        span = await call_of(collector, "GenerateStream")
        assert values(span.attributes)["error.type"] == "CANCELLED"
        assert set(collector.children(span)) == {"prepare", "queue", "prefill", "decode"}


async def test_no_span_holds_what_a_call_said(collector: Collector, tmp_path: Path) -> None:
    async with running(tmp_path, **traced(collector)) as up:
        await up.register("alpha", 1, labels={"canary-label": "canary-label"})
        request = generation_pb2.GenerateRequest(
            prompt="canary-prompt",
            adapter_id="alpha",
            cache_salt="canary-salt",
            stop={"strings": ["canary-stop"], "max_new_tokens": 4},
            sampling={"temperature": 0.0},
        )
        secrets = (("authorization", "Bearer canary-key"), ("canary-header", "canary"))
        reply = await up.generation.Generate(request, metadata=secrets)
        chat = generation_pb2.GenerateRequest(stop={"max_new_tokens": 1})
        chat.messages.messages.add(role="user", content="canary-message")
        await up.generation.Generate(chat, metadata=secrets)
        with pytest.raises(grpc.aio.AioRpcError):
            await up.adapters.RegisterAdapter(
                adapter_pb2.RegisterAdapterRequest(name="beta", path="canary-path"),
                metadata=secrets,
            )
        await call_of(collector, "Generate", 2)
        await asyncio.to_thread(collector.call, "RegisterAdapter", 2)
    sent = b"".join(collector.requests)
    assert b"alpha" in sent
    assert b"canary" not in sent
    assert len(reply.text) > 3
    assert reply.text.encode() not in sent


MALFORMED = [
    "",
    "00",
    VALID[:-1],
    VALID + "-extra",
    VALID.replace("00-", "ff-", 1),
    "00-" + "0" * 32 + "-b7ad6b7169203331-01",
    "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
    VALID.upper(),
    VALID.replace("-", "_"),
    "00-" + "g" * 32 + "-b7ad6b7169203331-01",
    "x" * 4000,
    "%s %n {0}",
]


async def send(up: Running, *metadata: tuple[str, str]) -> None:
    await up.generation.Generate(ask(new=1), metadata=metadata)


async def test_a_malformed_traceparent_is_ignored(collector: Collector, tmp_path: Path) -> None:
    async with running(tmp_path, **traced(collector)) as up:
        for text in MALFORMED:
            await send(up, ("traceparent", text))
        await send(up, ("tracestate", "a=b"))
        await send(up, ("traceparent", VALID), ("tracestate", "=,=;" + "a" * 600 + "=b"))
        await send(up, ("traceparent", VALID), ("tracestate", "vendor=value"))
        spans = await asyncio.to_thread(collector.call, "Generate", len(MALFORMED) + 3)
    *roots, other, valid = spans
    assert all(root.parent_span_id == b"" for root in roots)
    assert len({root.trace_id for root in roots}) == len(roots)
    for span in (other, valid):
        assert span.trace_id.hex() == VALID.split("-")[1]
        assert span.parent_span_id.hex() == VALID.split("-")[2]
    assert valid.trace_state == "vendor=value"


async def test_a_trace_that_its_client_does_not_sample_is_not_exported(
    collector: Collector, tmp_path: Path
) -> None:
    async with running(tmp_path, **traced(collector)) as up:
        await send(up, ("traceparent", VALID[:-1] + "0"))
        await up.generation.Generate(ask(new=1), metadata=(("traceparent", VALID),))
        (span,) = await asyncio.to_thread(collector.call, "Generate", 1)
        assert span.parent_span_id.hex() == VALID.split("-")[2]
    assert len(collector.call("Generate")) == 1


async def test_the_sampler_of_the_environment_decides(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    async with running(tmp_path, **traced(collector)) as up:
        await send(up, ("traceparent", VALID))
    assert not collector.spans


async def test_probes_and_reflection_are_not_traced(collector: Collector, tmp_path: Path) -> None:
    async with running(tmp_path, **traced(collector)) as up:
        async with AsyncClient(str(up.server.address)) as client:
            await client.health()
        await send(up)
    assert {span.name for span in collector.spans} == {
        "loraplex.v1.GenerationService/Generate", "prepare", "queue", "prefill", "decode",
    }  # fmt: skip


async def test_what_is_left_is_exported_before_the_server_ends(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    async with running(tmp_path, **traced(collector)) as up:
        await send(up)
        assert not collector.spans
        metrics = up.server.metrics.registry
    assert len(collector.call("Generate")) == 1
    exported = metrics.get_sample_value("loraplex_trace_spans_total", {"result": "exported"})
    assert exported == len(collector.spans)


async def test_the_span_of_several_completions_is_one_with_the_sums(
    collector: Collector, tmp_path: Path
) -> None:
    async with running(tmp_path, **traced(collector)) as up:
        await up.generation.Generate(ask(*range(20, 40), new=3, n=4))
        span = await call_of(collector, "Generate")
        found = values(span.attributes)
        assert found["gen_ai.request.choice.count"] == 4
        assert found["gen_ai.usage.output_tokens"] == 12
        assert found["gen_ai.usage.input_tokens"] == 20
        assert found["gen_ai.response.finish_reasons"] == ["length"] * 4
        assert {"queue", "prefill", "decode"} <= collector.children(span).keys()
