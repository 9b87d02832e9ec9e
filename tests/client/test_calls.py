"""Both clients give the same answers, and set the deadlines and retries they promise."""

from __future__ import annotations

import inspect
import math

import grpc
import pytest
from client.fake_server import DIGEST, FakeServer, failure
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from loraplex import (
    AdapterState,
    AsyncClient,
    Client,
    Delta,
    Finished,
    FinishReason,
    HealthStatus,
    ResolvedAdapter,
    ServerFault,
    Unavailable,
    Usage,
)

COARSE = 1.05  # on the wire a long timeout is rounded up to few digits
BUSY = failure(grpc.StatusCode.UNAVAILABLE, "OVERLOADED")


def members(kind: type) -> dict[str, list[inspect.Parameter]]:
    return {
        name: list(inspect.signature(member).parameters.values())
        for name, member in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


def test_both_clients_have_the_same_calls_with_the_same_arguments():
    assert members(Client) == members(AsyncClient)
    constructors = [inspect.signature(kind.__init__).parameters for kind in (Client, AsyncClient)]
    assert list(constructors[0].values()) == list(constructors[1].values())


def test_every_call_of_both_clients_is_documented():
    for kind in (Client, AsyncClient, type(Client().training), type(AsyncClient().training)):
        missing = [name for name in members(kind) if not getattr(kind, name).__doc__]
        assert missing == [], kind


@pytest.mark.parametrize(
    ("method", "arguments", "options"),
    [
        ("generate", ("one two",), {}),
        ("generate", (), {"messages": [{"role": "user", "content": "x"}], "adapter": "pirate"}),
        ("generate", ("x",), {"n": 4, "return_prompt_token_ids": True}),
        ("tokenize", ("é",), {}),
        ("tokenize", ("é",), {"special_tokens": False, "pieces": True}),
        ("detokenize", ([1, 195],), {"pieces": True}),
        ("generate", ("x",), {"mix": {"pirate": 0.5, "poet": 0.25}, "request_id": "mine"}),
        ("register_adapter", ("pirate", "dir"), {"replace": True, "load": True}),
        ("register_adapter", ("pirate", "dir"), {}),
        ("get_adapter", ("pirate",), {}),
        ("list_adapters", (), {"page_size": 1}),
        ("load_adapter", ("pirate",), {}),
        ("unload_adapter", ("poet",), {"force": True}),
        ("health", (), {}),
    ],
)
async def test_sync_and_async_results_are_equal(server: FakeServer, method, arguments, options):
    results = []
    for _ in range(2):
        server.adapters.clear()
        with Client(server.target) as setup:
            setup.register_adapter("pirate", "dir", load=True)
            setup.register_adapter("poet", "dir")
        server.calls.clear()
        if not results:
            with Client(server.target) as client:
                results.append(getattr(client, method)(*arguments, **options))
            sent = [(call.method, call.request) for call in server.calls]
        else:
            async with AsyncClient(server.target) as async_client:
                results.append(await getattr(async_client, method)(*arguments, **options))
    assert results[0] == results[1]
    assert sent == [(call.method, call.request) for call in server.calls]


async def test_a_drained_stream_equals_the_unary_reply(server: FakeServer, client: Client):
    whole = client.generate("one two", adapter="pirate", logprobs=1)
    assert client.stream("one two", adapter="pirate", logprobs=1).completion() == whole
    async with AsyncClient(server.target) as async_client:
        stream = async_client.stream("one two", adapter="pirate", logprobs=1)
        assert await stream.completion() == whole


def test_a_completion_carries_what_the_server_said(client: Client):
    done = client.generate("hello", adapter="pirate", request_id="mine")
    assert done.text == "pirate says hello"
    assert done.token_ids == (0, 1, 2)
    assert done.finish_reason is FinishReason.STOP
    assert done.usage == Usage(prompt_tokens=3, completion_tokens=3)
    assert done.adapters == (ResolvedAdapter("pirate", 1, DIGEST, 1.0),)
    assert done.request_id == "mine"
    assert [entry.chosen.token_id for entry in done.logprobs] == [0, 1, 2]
    assert done.prompt_logprobs[0].top[1].text == "<7>"


def test_a_stream_is_started_then_deltas_then_finished(client: Client):
    stream = client.stream("hello", adapter="pirate")
    assert stream.started is None
    first = next(stream)
    assert isinstance(first, Delta)
    assert (first.text, first.token_ids) == ("pirate", (0,))
    assert stream.started is not None
    assert stream.started.prompt_tokens == 3
    assert stream.finished is None
    assert [delta.text for delta in stream] == [" says", " hello"]
    assert stream.finished == Finished(
        FinishReason.STOP, Usage(3, 3), (ResolvedAdapter("pirate", 1, DIGEST, 1.0),)
    )
    assert stream.completion().text == "pirate says hello"
    stream.cancel()
    assert list(stream) == []


def test_an_adapter_has_a_state_and_a_time_zone(client: Client):
    info = client.register_adapter("pirate", "dir", load=True).adapter
    assert info.state is AdapterState.RESIDENT
    assert info.create_time is not None
    assert info.create_time.isoformat() == "2023-11-14T22:13:20+00:00"
    assert info.target_modules == ("q_proj", "v_proj")


def test_registering_the_same_bytes_again_says_so(client: Client):
    assert client.register_adapter("pirate", "dir").created
    assert not client.register_adapter("pirate", "dir").created


def test_listing_reads_every_page(server: FakeServer, client: Client):
    for name in ("a", "b", "c"):
        client.register_adapter(name, "dir")
    assert [info.name for info in client.list_adapters(page_size=2)] == ["a", "b", "c"]
    assert server.methods().count("ListAdapters") == 2


def test_deleting_forgets_the_name(client: Client):
    client.register_adapter("a", "dir")
    client.delete_adapter("a")
    assert client.list_adapters() == []


@pytest.mark.parametrize("status", list(HealthStatus))
def test_health_is_the_servers_word(server: FakeServer, client: Client, status: HealthStatus):
    server.serving = health_pb2.HealthCheckResponse.ServingStatus.Value(status.name)
    assert client.health() is status


# Deadlines


def test_a_call_has_the_clients_deadline_unless_it_gives_its_own(server: FakeServer):
    with Client(server.target) as client:
        client.generate("x")
        client.generate("x", timeout=1000)
    default, own = (call.time_remaining for call in server.calls)
    assert default is not None
    assert own is not None
    assert 0 < default <= 120 * COARSE < own <= 1000 * COARSE


async def test_the_async_client_sets_deadlines_too(server: FakeServer):
    async with AsyncClient(server.target, timeout=500) as client:
        await client.generate("x")
        await client.stream("x", timeout=1000).completion()
    default, own = (call.time_remaining for call in server.calls)
    assert default is not None
    assert own is not None
    assert 120 * COARSE < default <= 500 * COARSE < own <= 1000 * COARSE


def test_no_timeout_means_no_deadline(server: FakeServer):
    with Client(server.target, timeout=None) as client:
        client.generate("x")
    remaining = server.calls[0].time_remaining
    assert remaining is None or remaining > 10**8


def test_metadata_goes_with_every_call(server: FakeServer):
    with Client(server.target, metadata=[("x-tenant", "blue")]) as client:
        client.generate("x")
        client.stream("x").completion()
        client.list_adapters()
        client.health()
    assert [call.metadata.get("x-tenant") for call in server.calls] == ["blue"] * 4


# Retries


@pytest.mark.parametrize("attempts", [2, 4])
def test_unavailable_is_retried(server: FakeServer, client: Client, attempts: int):
    server.failures = [BUSY] * (attempts - 1)
    assert client.generate("x").text == "base says x"
    assert server.methods() == ["Generate"] * attempts


def test_the_fourth_failure_is_reported(server: FakeServer, client: Client):
    server.failures = [BUSY] * 9
    with pytest.raises(Unavailable):
        client.generate("x")
    assert server.methods() == ["Generate"] * 4


async def test_the_async_client_retries_too(server: FakeServer):
    server.failures = [BUSY] * 2
    async with AsyncClient(server.target) as client:
        assert (await client.stream("x").completion()).text == "base says x"
    assert server.methods() == ["GenerateStream"] * 3


def test_a_stream_is_retried_before_its_first_message(server: FakeServer, client: Client):
    server.failures = [BUSY]
    assert client.stream("x").completion().text == "base says x"
    assert server.methods() == ["GenerateStream"] * 2


def test_a_stream_is_never_retried_after_its_first_message(server: FakeServer, client: Client):
    server.break_after = 2
    stream = client.stream("x")
    assert [next(stream).text, next(stream).text] == ["base", " says"]
    with pytest.raises(Unavailable):
        next(stream)
    assert server.methods() == ["GenerateStream"]


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ],
)
def test_nothing_but_unavailable_is_retried(server: FakeServer, client: Client, code):
    server.failures = [failure(code, "WHATEVER")] * 2
    with pytest.raises(Exception, match="WHATEVER"):
        client.generate("x")
    assert server.methods() == ["Generate"]


def test_the_server_can_forbid_retries(server: FakeServer, client: Client):
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=60))
    draining = failure(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry)
    server.failures = [
        type(draining)(
            draining.code, draining.message, draining.details, (("grpc-retry-pushback-ms", "-1"),)
        )
    ]
    with pytest.raises(Unavailable) as caught:
        client.generate("x")
    assert caught.value.retry_after == 60
    assert server.methods() == ["Generate"]


def test_a_delete_is_not_repeated(server: FakeServer, client: Client):
    server.failures = [BUSY]
    with pytest.raises(Unavailable):
        client.delete_adapter("x")
    assert server.methods() == ["DeleteAdapter"]


def test_health_reports_the_first_answer(server: FakeServer, client: Client):
    server.failures = [BUSY]
    with pytest.raises(Unavailable):
        client.health()
    assert server.methods() == ["Check"]


def test_a_stream_without_an_end_is_no_success(server: FakeServer, client: Client):
    server.omit_finished = True
    with pytest.raises(ServerFault) as caught:
        client.stream("x").completion()
    assert caught.value.reason == "STREAM_INCOMPLETE"


def test_nan_is_the_servers_to_refuse(server: FakeServer, client: Client):
    client.generate("x", temperature=math.nan)
    assert math.isnan(server.calls[0].request.sampling.temperature)
