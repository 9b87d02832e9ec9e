"""Every call has one caller from its first byte to its end, and nobody else's."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import generation_pb2, model_pb2, model_pb2_grpc
from loraplex_server.access.principals import caller, set_caller
from loraplex_server.access.roles import METHOD_ROLES, Role
from loraplex_server.logs import REQUEST_ID
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.writing import StreamWriter
from loraplex_server.rpc.services.generation import GenerationService
from loraplex_server.rpc.services.model import ModelService
from loraplex_server.runtime.watched import WatchedTask
from rpc.harness import ask, expected, refusal, rest, running, streamed, until
from rpc.raw_http2 import DATA, DEFAULT_WINDOW, frame, raw_connection
from security.callers import OPS, Callers, code_of, guarded, key, principal, register

GENERATE = "/loraplex.v1.GenerationService/Generate"
WATCH = "/loraplex.v1.AdapterService/WatchAdapters"
UPLOAD = "/loraplex.v1.AdapterService/UploadAdapter"
GET_MODEL = "/loraplex.v1.ModelService/GetModel"
RECHECK = "loraplex_server.rpc.calls.access.RECHECK_SECONDS"
UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED

EMPTY_TABLE = reflection_pb2.ServerReflectionRequest(list_services="")


async def test_an_unknown_caller_is_refused_before_anything_of_its_request_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a request was read")

    monkeypatch.setattr("loraplex_server.rpc.calls.intake.Intake.decode", read)
    async with (
        guarded(tmp_path, monkeypatch, Callers()) as up,
        raw_connection(up.server.address, DEFAULT_WINDOW) as hostile,
    ):
        # Headers alone, the beginning of a message, all but the end of the largest: for each kind.
        methods = (GENERATE, WATCH, UPLOAD)
        calls = {hostile.call(method, end=False) for method in methods}
        calls |= {hostile.call(method, b"x" * 1000, end=False) for method in methods}
        await until(lambda: hostile.ended >= calls)
        assert len(up.server._path.arrivals) == 0
        assert up.metric("rejected_requests_total", reason="CREDENTIALS_MISSING") == len(calls)
        # What is still sent for these calls harms no later one.
        for stream in calls:
            hostile.send(frame(DATA, 0, stream, bytes(16_000)))
        later = hostile.call(GENERATE, b"")
        await until(lambda: later in hostile.ended)


async def test_all_methods_and_adapters_look_the_same_to_an_unknown_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    async with guarded(tmp_path, monkeypatch, Callers(principal(OPS))) as up:
        write = {"metadata": key(OPS), "timeout": 60}
        reply = await up.adapters.StartUpload(pb.StartUploadRequest(), **write)
        requests = [
            (GET_MODEL, b""),
            (GENERATE, ask(adapter="unknown").SerializeToString()),
            (GENERATE, ask().SerializeToString()),
            (GENERATE, b"\xff"),
            ("/loraplex.v1.AdapterService/DeleteAdapter", b""),
            (
                "/loraplex.v1.AdapterService/AbortUpload",
                pb.AbortUploadRequest(upload_id=reply.upload_id).SerializeToString(),
            ),
        ]
        for metadata in (None, key("unknown"), key(""), key(OPS) * 2, (("authorization", OPS * 9),)):
            for method, request in requests:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await up.channel.unary_unary(method)(request, metadata=metadata)
                status = refusal(caught.value)
                ids = {status.trailers.pop("x-request-id") for _ in range(1)}
                assert len(ids) == 1
                names = sorted(status.trailers)
                seen.add((status.code, status.reason, status.message, tuple(names)))
        assert {(code, reason) for code, reason, *_ in seen} == {
            (UNAUTHENTICATED, "CREDENTIALS_MISSING"),
            (UNAUTHENTICATED, "CREDENTIALS_INVALID"),
        }
        assert len(seen) == 2
        assert (
            await up.adapters.GetUpload(
                pb.GetUploadRequest(upload_id=reply.upload_id), metadata=key(OPS)
            )
        ).config_bytes == 0


async def test_several_credentials_are_refused_even_if_one_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = Callers(principal(OPS))
    async with guarded(tmp_path, monkeypatch, callers) as up:
        model = model_pb2_grpc.ModelServiceStub(up.channel)
        for given in (key(OPS) * 2, key(OPS) + key("other"), (*key(OPS), ("authorization", ""))):
            call = model.GetModel(model_pb2.GetModelRequest(), metadata=given)
            assert await code_of(call) is UNAUTHENTICATED
        assert callers.asked == 0
        call = model.GetModel(model_pb2.GetModelRequest(), metadata=key(OPS))
        assert await code_of(call) is grpc.StatusCode.OK


async def test_probes_need_no_credential_and_reflection_needs_a_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, nobody = principal("reader", [Role.READ]), principal("nobody", [])
    async with guarded(tmp_path, monkeypatch, Callers(reader, nobody)) as up:
        health = health_pb2_grpc.HealthStub(up.channel)
        check = await health.Check(health_pb2.HealthCheckRequest(), metadata=key("unknown"))
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        stub = reflection_pb2_grpc.ServerReflectionStub(up.channel)
        outcomes = {}
        for who in ("reader", "nobody", "unknown"):
            call = stub.ServerReflectionInfo(iter([EMPTY_TABLE]), metadata=key(who))
            outcomes[who] = await code_of(rest(call))
        assert outcomes == {
            "reader": grpc.StatusCode.OK,
            "nobody": DENIED,
            "unknown": UNAUTHENTICATED,
        }


@pytest.mark.parametrize("authenticated", [True, False])
async def test_a_method_without_an_entry_is_refused_to_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authenticated: bool
) -> None:
    rest_of_them = {name: roles for name, roles in METHOD_ROLES.items() if name != GET_MODEL}
    monkeypatch.setattr("loraplex_server.rpc.calls.access.METHOD_ROLES", rest_of_them)
    callers = Callers(principal(OPS)) if authenticated else None
    async with guarded(tmp_path, monkeypatch, callers) as up:
        model = model_pb2_grpc.ModelServiceStub(up.channel)
        for _ in range(2):
            call = model.GetModel(model_pb2.GetModelRequest(), metadata=key(OPS))
            assert await code_of(call) is DENIED
        assert await code_of(up.generation.Generate(ask(), metadata=key(OPS))) is not DENIED


async def test_a_failure_to_identify_lets_nobody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Callers):
        def identify(self, credentials: object) -> Any:
            raise RuntimeError("a fault of the directory")

    async with guarded(tmp_path, monkeypatch, Broken()) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(), metadata=key(OPS))
        assert refusal(caught.value).reason == "ENGINE_FAULT"
        assert "fault of the directory" not in str(caught.value)


async def test_concurrent_calls_see_their_own_caller_wherever_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unary calls, streams, uploads and cancelled ones, sixteen principals at once."""
    seen: dict[str, set[str]] = {}

    async def note(who: str) -> None:
        for _ in range(3):
            seen.setdefault(who, set()).add(caller().name)
            await asyncio.sleep(0.001)
            child = asyncio.create_task(asyncio.sleep(0, caller().name))
            seen[who].add(await child)

    async def get_model(service: object, request: object, context: Any) -> Any:
        who = dict(context.invocation_metadata())["who"]
        await note(who)
        return model_pb2.GetModelResponse(model=model_pb2.Model(name=caller().name))

    real = GenerationService._events

    async def events(service: Any, request: Any, context: Any, streaming: bool = False) -> Any:
        who = dict(context.invocation_metadata())["who"]
        try:
            async for event in real(service, request, context, streaming):
                await note(who)
                yield event
        finally:
            await note(who)

    monkeypatch.setattr(ModelService, "GetModel", get_model)
    monkeypatch.setattr(GenerationService, "_events", events)
    names = [f"tenant-{i}" for i in range(16)]
    async with guarded(tmp_path, monkeypatch, Callers(*map(principal, names))) as up:
        model = model_pb2_grpc.ModelServiceStub(up.channel)

        async def use(name: str) -> None:
            given = {"metadata": (*key(name), ("who", name))}
            for _ in range(3):
                reply = await model.GetModel(model_pb2.GetModelRequest(), **given)
                assert reply.model.name == name
                cancelled = up.generation.GenerateStream(streamed(ask(new=300)), **given)
                await cancelled.read()
                cancelled.cancel()
                whole = await up.generation.Generate(ask(new=5), **given)
                assert list(whole.token_ids) == expected([20, 21, 22], 5)

        await asyncio.gather(*map(use, names))
        await until(lambda: up.metric("running_requests") == 0)
        assert seen == {name: {name} for name in names}
        with pytest.raises(LookupError):
            caller()


async def test_without_principals_everybody_may_call_and_nothing_is_asked(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        reply = await up.generation.Generate(ask(new=4), metadata=key("whoever") * 2)
        assert list(reply.token_ids) == expected([20, 21, 22], 4)
        assert (await up.register("alpha")).version == 1


async def test_what_is_done_for_a_stalled_stream_is_done_as_its_caller() -> None:
    """One timer serves all writes, so it is set by one caller's call and ends another's stream."""
    gate = CallGate()
    writer = StreamWriter(gate, 0.05)
    found: dict[str, list[str]] = {}
    release = asyncio.Event()

    class Stuck:
        async def write(self, event: object) -> None:
            await release.wait()

    async def stream(name: str, seconds: float) -> None:
        set_caller(principal(name))
        REQUEST_ID.set(f"id of {name}")
        await asyncio.sleep(seconds)

        async def events() -> AsyncGenerator[Any, None]:
            try:
                yield object()
            finally:
                found[name] += [caller().name, REQUEST_ID.get()]

        def on_stall() -> None:
            found[name] = [caller().name, REQUEST_ID.get()]

        generator = events()
        event: Any = await anext(generator)
        await writer.write(Stuck(), event, generator, on_stall)  # type: ignore[arg-type]

    streams = [asyncio.create_task(stream(f"t{i}", i / 100)) for i in range(3)]
    await until(lambda: len(found) == 3 and all(len(each) == 4 for each in found.values()))
    release.set()
    await asyncio.gather(*streams)
    assert found == {f"t{i}": [f"t{i}", f"id of t{i}"] * 2 for i in range(3)}


async def test_a_task_that_outlives_calls_has_no_caller() -> None:
    def within_a_call() -> WatchedTask:
        set_caller(principal("first"))
        return WatchedTask(look(), "a task")

    seen: list[str] = []

    async def look() -> None:
        try:
            seen.append(caller().name)
        except LookupError:
            seen.append("nobody")
        await asyncio.Event().wait()

    task = contextvars.copy_context().run(within_a_call)
    await until(lambda: bool(seen))
    await task.stop()
    assert seen == ["nobody"]


async def test_a_watch_ends_soon_after_its_credential_and_a_generation_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RECHECK, 0.05)
    callers = Callers(principal("alice"), principal("bob"))
    slow = {"step_seconds": 0.002, "num_blocks": 1024}
    async with guarded(tmp_path, monkeypatch, callers, engine_options=slow) as up:
        watches = {
            name: up.adapters.WatchAdapters(pb.WatchAdaptersRequest(), metadata=key(name))
            for name in ("alice", "bob")
        }
        for watch in watches.values():
            assert (await watch.read()).table.complete
        stream = up.generation.GenerateStream(streamed(ask(new=200)), metadata=key("alice"))
        await stream.read()
        uploading: asyncio.Queue[pb.UploadAdapterRequest] = asyncio.Queue()

        async def upload() -> AsyncGenerator[pb.UploadAdapterRequest, None]:
            while True:
                yield await uploading.get()

        started = await up.adapters.StartUpload(pb.StartUploadRequest(), metadata=key("alice"))
        call = up.adapters.UploadAdapter(upload(), metadata=key("alice"))
        header = pb.UploadHeader(
            upload_id=started.upload_id, name="n", config_size=10, weights_size=10
        )
        uploading.put_nowait(pb.UploadAdapterRequest(header=header))
        del callers.known["alice"]
        assert await code_of(rest(watches["alice"])) is UNAUTHENTICATED
        chunk = pb.UploadChunk(file=pb.ADAPTER_FILE_CONFIG, data=b"0123456789")
        uploading.put_nowait(pb.UploadAdapterRequest(chunk=chunk))
        assert await code_of(call) is UNAUTHENTICATED
        events = await rest(stream)
        assert events[-1].HasField("finished")
        assert not watches["bob"].done()
        registered = asyncio.create_task(up.adapters.DeleteAdapter(
            pb.DeleteAdapterRequest(name="unknown"), metadata=key("bob")
        ))
        assert await code_of(registered) is grpc.StatusCode.NOT_FOUND
        watches["bob"].cancel()


async def test_a_watch_ends_when_its_caller_may_see_other_adapters_or_loses_its_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RECHECK, 0.05)
    callers = Callers(principal("a", adapters="team=a"), principal("b", adapters="team=b"))
    async with guarded(tmp_path, monkeypatch, callers) as up:
        watches = [
            up.adapters.WatchAdapters(pb.WatchAdaptersRequest(), metadata=key(name))
            for name in ("a", "b")
        ]
        for watch in watches:
            assert (await watch.read()).table.complete
        callers.known["a"] = principal("a", adapters="team=c")
        callers.known["b"] = principal("b", [Role.INFER], adapters="team=b")
        for watch in watches:
            assert await code_of(rest(watch)) is DENIED


async def test_a_watch_that_is_confirmed_loses_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RECHECK, 0.001)  # so that it is confirmed before, between and after events
    callers = Callers(principal(OPS))
    async with guarded(tmp_path, monkeypatch, callers) as up:
        watch = up.adapters.WatchAdapters(pb.WatchAdaptersRequest(), metadata=key(OPS))
        assert (await watch.read()).table.complete
        for i in range(8):
            await register(up, OPS, f"n-{i}", seed=i)
        seen = []
        while len(seen) < 8:
            change = (await watch.read()).change
            if change.type == pb.ADAPTER_CHANGE_TYPE_REGISTERED:
                seen.append(change.adapter.name)
        assert seen == [f"n-{i}" for i in range(8)]
        watch.cancel()
        assert callers.asked > 20


async def test_refusals_are_counted_by_reason_and_add_no_other_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = principal("reader", [Role.READ])
    async with guarded(tmp_path, monkeypatch, Callers(reader)) as up:
        for i in range(30):
            unknown = up.channel.unary_unary(f"/loraplex.v1.GenerationService/Method{i}")
            assert await code_of(unknown(b"", metadata=key(f"name-{i}"))) is (
                grpc.StatusCode.UNIMPLEMENTED
            )
            assert await code_of(up.generation.Generate(ask(), metadata=key(f"name-{i}"))) is (
                UNAUTHENTICATED
            )
        assert await code_of(up.generation.Generate(ask(), metadata=key("reader"))) is DENIED
        assert up.metric("rejected_requests_total", reason="CREDENTIALS_INVALID") == 30
        assert up.metric("rejected_requests_total", reason="PERMISSION_DENIED") == 1
        labels = {
            sample.labels["method"]
            for family in up.server.metrics.registry.collect()
            for sample in family.samples
            if family.name == "loraplex_requests"
        }
        assert labels == {"Generate"}


async def test_a_draining_server_tells_unknown_callers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded(tmp_path, monkeypatch, Callers(principal(OPS))) as up:
        up.server._gate.close()
        generate = up.generation.Generate
        assert await code_of(generate(ask())) is UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(ask(), metadata=key(OPS))
        assert refusal(caught.value).reason == "DRAINING"


def test_every_streaming_request_type_is_known_here() -> None:
    """The upload is the only stream of requests; another one needs a test of its revocation."""
    services = [*pb.DESCRIPTOR.services_by_name.values()]
    services += generation_pb2.DESCRIPTOR.services_by_name.values()
    streaming = {
        method.name for each in services for method in each.methods if method.client_streaming
    }
    assert streaming == {"UploadAdapter"}
