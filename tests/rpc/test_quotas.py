"""Limits of principals as clients meet them, and calls while memory is short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from loraplex.v1 import adapter_pb2
from loraplex_server.access.principals import PrincipalLimits
from loraplex_server.engine.messages import Submit
from loraplex_server.runtime import parts, pressure
from rpc.harness import (
    NONFINITE,
    Refused,
    Running,
    ask,
    expected,
    refusal,
    rest,
    running,
    streamed,
    until,
    write_adapter,
)
from rpc.principals import Acting, acting, limited
from rpc.training_jobs import training


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    options = {"step_seconds": 0.002, "num_blocks": 256}
    async with running(tmp_path, max_running=4, engine_options=options) as server:
        yield server


@pytest.fixture
def who(monkeypatch: pytest.MonkeyPatch) -> Acting:
    return acting(monkeypatch)


async def refused(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


def retry_of(seen: Refused) -> float:
    """The pause in both places, which must agree."""
    delay = seen.detail(error_details_pb2.RetryInfo).retry_delay
    seconds = float(delay.ToTimedelta().total_seconds())
    assert seen.trailers["grpc-retry-pushback-ms"] == str(round(seconds * 1000))
    return seconds


async def test_a_refusal_names_the_limit_and_the_time(up: Running, who: Acting) -> None:
    with who.as_(limited(requests_per_minute=2)):
        for _ in range(2):
            await up.generation.Generate(ask(new=1))
        seen = await refused(up.generation.Generate(ask(new=1)))
    assert (seen.code, seen.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    (violation,) = seen.detail(error_details_pb2.QuotaFailure).violations
    assert violation.subject == "principal:search"
    assert violation.quota_id == "requests_per_minute"
    assert "2 requests a minute" in violation.description
    assert 25 < retry_of(seen) <= 30
    with who.as_(limited("other", requests_per_minute=2)):
        await up.generation.Generate(ask(new=1))
    await up.generation.Generate(ask(new=1))
    await until(
        lambda: (
            up.metric("quota_refusals_total", principal="_other", limit="requests_per_minute") == 1
        )
    )


async def test_a_stream_is_never_cut_and_the_next_request_is_told_the_true_time(
    up: Running, who: Acting
) -> None:
    with who.as_(limited(tokens_per_minute=20)):
        call = up.generation.GenerateStream(streamed(ask(20, 21, 22, new=50)))
        messages = await rest(call)
        tokens = [token for message in messages for token in message.delta.token_ids]
        assert tokens == expected([20, 21, 22], 50)
        seen = await refused(up.generation.Generate(ask(new=1)))
        # 53 of 20 were used, so 34 are missing for one more, at one in three seconds.
        assert 98 < retry_of(seen) <= 102
        assert "tokens_per_minute" in seen.message


async def test_a_prompt_that_never_fits_is_refused_without_a_time(up: Running, who: Acting) -> None:
    with who.as_(limited(tokens_per_minute=3)):
        seen = await refused(up.generation.Generate(ask(20, 21, 22, 23)))
        assert [type(detail).__name__ for detail in seen.details] == ["ErrorInfo", "QuotaFailure"]
        assert "grpc-retry-pushback-ms" not in seen.trailers
        assert "never" in seen.message
        await up.generation.Generate(ask(20, 21, 22, new=1))


async def test_a_cancelled_stream_gives_its_place_back_and_a_refused_request_takes_none(
    up: Running, who: Acting
) -> None:
    with who.as_(limited(concurrent_requests=1, requests_per_minute=3)):
        call = up.generation.GenerateStream(streamed(ask(new=400)))
        assert (await call.read()).WhichOneof("event") == "started"
        for _ in range(5):
            seen = await refused(up.generation.Generate(ask(new=1)))
            assert "concurrent_requests" in seen.message
            assert retry_of(seen) == 0.5
        call.cancel()
        await until(lambda: up.metric("running_requests") == 0)
        await until(lambda: up.metric("principal_active_requests", principal="_other") == 0)
        for _ in range(2):
            await up.generation.Generate(ask(new=1))
        assert "requests_per_minute" in (await refused(up.generation.Generate(ask()))).message
    assert up.metric("queue_depth") == 0


async def test_an_unknown_adapter_counts_so_that_names_cannot_be_guessed_without_a_limit(
    up: Running, who: Acting
) -> None:
    with who.as_(limited(requests_per_minute=2)):
        for name in ("a", "b"):
            seen = await refused(up.generation.Generate(ask(adapter=name)))
            assert seen.reason == "ADAPTER_NOT_FOUND"
        seen = await refused(up.generation.Generate(ask(adapter="c")))
        assert seen.reason == "QUOTA_EXCEEDED"


async def test_a_row_that_fails_costs_other_principals_nothing(up: Running, who: Acting) -> None:
    """Rows of two principals are in one batch, and the logits of one of them are not finite."""
    with who.as_(limited("good", concurrent_requests=1)):
        good = up.generation.GenerateStream(streamed(ask(20, 21, new=120)))
        assert (await good.read()).WhichOneof("event") == "started"
    with who.as_(limited("bad", concurrent_requests=1)):
        for _ in range(3):  # the place of each is free for the next
            seen = await refused(up.generation.Generate(ask(20, NONFINITE)))
            assert seen.reason == "NON_FINITE_LOGITS"
    messages = await rest(good)
    tokens = [token for message in messages for token in message.delta.token_ids]
    assert tokens == expected([20, 21], 120)
    with who.as_(limited("good", concurrent_requests=1)):
        await up.generation.Generate(ask(20, 21, new=1))


async def test_requests_carry_their_principal_its_weight_and_its_highest_priority(
    up: Running, who: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Submit] = []
    submit = up.server.engine.submit

    def noting(request: Submit) -> object:
        seen.append(request)
        return submit(request)

    monkeypatch.setattr(up.server.engine, "submit", noting)
    with who.as_(limited(weight=2.5, max_priority=-3)):
        await up.generation.Generate(ask(new=1, priority=9))
        await up.generation.Generate(ask(new=1, priority=-9))
    await up.generation.Generate(ask(new=1, priority=9))
    assert [(s.principal, s.weight, s.account, s.priority) for s in seen] == [
        ("search", 2.5, "_base", -3),
        ("search", 2.5, "_base", -9),
        ("", 1.0, "_base", 9),
    ]


async def test_metrics_of_principals_are_those_of_the_file(up: Running, who: Acting) -> None:
    series = up.server.metrics.principals
    search = limited(requests_per_minute=100)
    series.follow({"search": search})
    assert up.metric("principal_limit", principal="search", limit="requests_per_minute") == 100
    with who.as_(search):
        await up.generation.Generate(ask(20, 21, 22, new=4))
        await refused(up.generation.Generate(ask(new=0, sampling={"temperature": -1.0})))
    with who.as_(limited("stranger")):
        await up.generation.Generate(ask(new=2))

    def requests(principal: str, code: str) -> float:
        return up.metric("principal_requests_total", principal=principal, code=code)

    await until(lambda: requests("_other", "OK") == 1)
    assert requests("search", "OK") == 1
    assert requests("search", "INVALID_ARGUMENT") == 1
    tokens = {
        kind: up.metric("principal_tokens_total", principal="search", kind=kind)
        for kind in ("prompt", "completion")
    }
    assert tokens == {"prompt": 3, "completion": 4}
    more = replace(search, limits=PrincipalLimits(tokens_per_minute=5))
    series.follow({"search": more})
    sample = up.server.metrics.registry.get_sample_value
    gone = {"principal": "search", "limit": "requests_per_minute"}
    assert sample("loraplex_principal_limit", gone) is None
    series.follow({})
    assert requests("search", "OK") == 0
    await up.generation.Generate(ask(new=1))  # callers that are not identified have none
    for family in up.server.metrics.registry.collect():
        for one in family.samples:
            assert one.labels.get("principal", "_other") == "_other"


# the store


def register(up: Running, name: str, seed: int = 0, **fields: Any) -> Any:
    write_adapter(up.folder / "import" / f"{name}-{seed}", seed)
    return up.adapters.RegisterAdapter(
        adapter_pb2.RegisterAdapterRequest(name=name, path=f"{name}-{seed}", **fields)
    )


async def test_registrations_at_the_same_time_do_not_exceed_the_number_of_adapters(
    up: Running, who: Acting
) -> None:
    with who.as_(limited(adapters=2)):
        done = await asyncio.gather(
            *(register(up, f"a{i}", i) for i in range(5)), return_exceptions=True
        )
    errors = [refusal(each) for each in done if isinstance(each, grpc.aio.AioRpcError)]
    assert [each.reason for each in errors] == ["QUOTA_EXCEEDED"] * 3
    assert all("grpc-retry-pushback-ms" not in each.trailers for each in errors)
    (violation,) = errors[0].detail(error_details_pb2.QuotaFailure).violations
    assert (violation.subject, violation.quota_id) == ("principal:search", "adapters")
    await register(up, "of-others", 9)
    with who.as_(limited(adapters=2)):
        name = next(f"a{i}" for i in range(5) if not isinstance(done[i], BaseException))
        await register(up, name, 8, replace=True)
        await up.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="of-others"))
        restore = adapter_pb2.RestoreAdapterRequest(name="of-others")
        assert (await refused(up.adapters.RestoreAdapter(restore))).reason == "QUOTA_EXCEEDED"


async def upload(up: Running, name: str, seed: int, pause: int = 0) -> adapter_pb2.Adapter:
    """Uploads an adapter; with `pause` only so many bytes of its weights."""
    folder = write_adapter(up.folder / "sent" / name, seed)
    config = (folder / "adapter_config.json").read_bytes()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    started = await up.adapters.StartUpload(adapter_pb2.StartUploadRequest())
    sent = weights[:pause] if pause else weights

    async def messages() -> AsyncIterator[adapter_pb2.UploadAdapterRequest]:
        header = adapter_pb2.UploadHeader(
            upload_id=started.upload_id,
            name=name,
            config_size=len(config),
            weights_size=len(weights),
        )
        yield adapter_pb2.UploadAdapterRequest(header=header)
        for file, data in (
            (adapter_pb2.ADAPTER_FILE_CONFIG, config),
            (adapter_pb2.ADAPTER_FILE_WEIGHTS, sent),
        ):
            chunk = adapter_pb2.UploadChunk(file=file, offset=0, data=data)
            yield adapter_pb2.UploadAdapterRequest(chunk=chunk)

    reply = await up.adapters.UploadAdapter(messages())
    return reply.adapter


async def test_unfinished_uploads_count_their_bytes_until_they_are_aborted(
    up: Running, who: Acting
) -> None:
    size = (await up.register("measure", 1)).size_bytes
    room = limited(seen="team=search", prefix="search-", store_bytes=2 * size + 4)
    with who.as_(room):
        await upload(up, "search-a", 2)
        part = await refused(upload(up, "search-b", 3, pause=8))
        assert part.reason == "UPLOAD_OFFSET"
        # There is room for one more, but for the few bytes that have arrived of another.
        seen = await refused(upload(up, "search-c", 4))
        assert seen.reason == "QUOTA_EXCEEDED"
        assert "unfinished uploads" in seen.message
        (violation,) = seen.detail(error_details_pb2.QuotaFailure).violations
        assert violation.quota_id == "store_bytes"
        for each in (await up.adapters.ListUploads(adapter_pb2.ListUploadsRequest())).uploads:
            abort = adapter_pb2.AbortUploadRequest(upload_id=each.upload_id)
            await up.adapters.AbortUpload(abort)
        await upload(up, "search-c", 4)


async def test_a_full_principal_begins_no_upload(up: Running, who: Acting) -> None:
    size = (await up.register("there", 1)).size_bytes
    with who.as_(limited(store_bytes=size)):
        seen = await refused(up.adapters.StartUpload(adapter_pb2.StartUploadRequest()))
        assert seen.reason == "QUOTA_EXCEEDED"
    with who.as_(limited(store_bytes=size + 1)):
        await up.adapters.StartUpload(adapter_pb2.StartUploadRequest())


# memory


async def test_short_of_memory_new_calls_are_refused_and_running_ones_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1000 << 20
    used = [0]
    monkeypatch.setattr(parts, "used_bytes", lambda: used[0])
    monkeypatch.setattr(pressure, "LOOK_SECONDS", 0.01)
    async with running(tmp_path, memory_limit=limit) as up:
        call = up.generation.GenerateStream(streamed(ask(20, 21, new=200)))
        assert (await call.read()).WhichOneof("event") == "started"
        used[0] = limit
        await until(lambda: up.metric("memory_pressure") == 3)
        for refused_call in (
            up.generation.Generate(ask(new=1)),
            register(up, "a"),
            up.adapters.StartUpload(adapter_pb2.StartUploadRequest()),
        ):
            seen = await refused(refused_call)
            assert (seen.reason, retry_of(seen)) == ("OVERLOADED", 2.0)
            assert "memory" in seen.message
        listed = await up.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
        assert not listed.adapters
        messages = await rest(call)
        tokens = [token for message in messages for token in message.delta.token_ids]
        assert tokens == expected([20, 21], 200)
        used[0] = 920 << 20
        await until(lambda: up.metric("memory_pressure") == 2)
        await up.generation.Generate(ask(new=1))
        assert (await refused(register(up, "a"))).reason == "OVERLOADED"
        used[0] = 0
        await until(lambda: up.metric("memory_pressure") == 0)
        await register(up, "a")


async def test_a_limit_below_what_the_server_takes_refuses_from_the_start(tmp_path: Path) -> None:
    async with running(tmp_path, memory_limit=1) as server:
        await until(lambda: server.metric("memory_pressure") == 3)
        assert (await refused(server.generation.Generate(ask()))).reason == "OVERLOADED"
        assert server.metric("memory_bytes", kind="limit") == 1
        assert server.metric("memory_bytes", kind="used") > 1 << 20


async def test_a_trained_adapter_is_checked_when_it_is_ordered_and_when_it_is_delivered(
    tmp_path: Path, who: Acting
) -> None:
    one = limited(adapters=1)
    async with training(tmp_path) as trains:
        jobs = trains.up.server._training
        assert jobs is not None
        jobs._destination._principals = lambda: {"search": one}  # type: ignore[attr-defined]
        with who.as_(one):
            made = trains.adapter(3)
            job = await trains.create("step 1", "hold", f"publish {made}", name="trained")
            await trains.holding(job, 1)
            await trains.up.register("registered", 1)  # meanwhile, within the limit
            trains.release(job)
            ended = await trains.ended(job)
            assert ended.error.reason == "QUOTA_EXCEEDED"
            assert "may have 1 adapters" in ended.error.message
            seen = await refused(trains.create("step 1", name="another"))
            assert seen.reason == "QUOTA_EXCEEDED"
            (violation,) = seen.detail(error_details_pb2.QuotaFailure).violations
            assert (violation.subject, violation.quota_id) == ("principal:search", "adapters")
            name = adapter_pb2.DeleteAdapterRequest(name="registered")
            await trains.up.adapters.DeleteAdapter(name)
            job = await trains.create("step 1", f"publish {made}", name="trained")
            ended = await trains.ended(job)
            assert ended.result.version == 1
