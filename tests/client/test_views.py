"""Embed and WatchEngine through both clients and on the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from loraplex import (
    AsyncClient,
    Client,
    Embeddings,
    EngineState,
    InvalidRequest,
    Unavailable,
    Unsupported,
)
from loraplex.cli import app
from loraplex.cli.views import top
from loraplex.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, generation_pb2_grpc
from typer.testing import CliRunner


@dataclass
class ViewServer(
    generation_pb2_grpc.GenerationServiceServicer, engine_pb2_grpc.EngineServiceServicer
):
    """Answers text i with [i, 0.5]; sends `states`, and then waits until the call ends."""

    states: list[engine_pb2.WatchEngineResponse] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    ends: grpc.StatusCode | None = None
    target: str = ""

    def Embed(self, request: generation_pb2.EmbedRequest, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        adapters = [generation_pb2.ResolvedAdapter(name="pirate", version=2, digest="d", weight=1)]
        return generation_pb2.EmbedResponse(
            request_id="r",
            adapters=adapters if request.adapter_id else [],
            embeddings=[
                generation_pb2.Embedding(values=[i, 0.5], tokens=i + 1, base_tokens=i)
                for i in range(len(request.inputs))
            ],
        )

    def WatchEngine(
        self, request: engine_pb2.WatchEngineRequest, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        self.requests.append(request)
        yield from self.states
        if self.ends is not None:
            context.abort(self.ends, "the server is shutting down")


def state(step: int, *rows: tuple[str, bool, int, int, int]) -> engine_pb2.WatchEngineResponse:
    return engine_pb2.WatchEngineResponse(
        time={"seconds": 1000 + step},
        steps=10 * step,
        generated_tokens=50 * step,
        prompt_tokens=7 * step,
        adapters=[
            engine_pb2.AdapterRows(adapter_id=name, hidden=hidden, prefill=p, decode=d, waiting=w)
            for name, hidden, p, d, w in rows
        ],
        kv_blocks_used=3,
        kv_blocks=64,
        kv_blocks_cached=5,
        resident_adapters=2,
        adapter_bytes=2048,
        adapter_bytes_limit=1 << 20,
        max_rows=8,
    )


ROWS = (("pirate@2", False, 1, 3, 2), ("", False, 0, 1, 0), ("", True, 0, 0, 1))


@pytest.fixture
def server() -> Iterator[ViewServer]:
    views = ViewServer([state(1, *ROWS), state(2)])
    running = grpc.server(ThreadPoolExecutor(4))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(views, running)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(views, running)
    views.target = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
    running.start()
    yield views
    running.stop(None).wait()


@pytest.fixture
def client(server: ViewServer) -> Iterator[Client]:
    with Client(server.target, timeout=30.0) as connected:
        yield connected


def run(server: ViewServer, *words: str, stdin: str = "") -> Any:
    return CliRunner().invoke(app, [*words, "--server", server.target], input=stdin)


def test_both_clients_send_the_same_request_and_read_the_same_vectors(
    server: ViewServer, client: Client
) -> None:
    chosen: Any = {"adapter": "pirate", "pooling": "mean", "raw_length": True, "request_id": "r"}

    async def awaited() -> tuple[Embeddings, Embeddings]:
        async with AsyncClient(server.target, timeout=30.0) as other:
            texts = await other.embed(["a", "日本"], **chosen)
            return texts, await other.embed(token_ids=[[1, 2], [3]])

    found = client.embed(["a", "日本"], **chosen), client.embed(token_ids=[[1, 2], [3]])
    assert asyncio.run(awaited()) == found
    assert server.requests[:2] == server.requests[2:]
    sent = server.requests[0]
    assert [each.text for each in sent.inputs] == ["a", "日本"]
    assert (sent.adapter_id, sent.pooling, sent.raw_length) == (
        "pirate",
        generation_pb2.POOLING_MEAN,
        True,
    )
    assert [list(each.token_ids.ids) for each in server.requests[1].inputs] == [[1, 2], [3]]
    assert server.requests[1].pooling == generation_pb2.POOLING_LAST
    texts, ids = found
    assert [vector.values for vector in texts.vectors] == [(0.0, 0.5), (1.0, 0.5)]
    assert [(vector.tokens, vector.base_tokens) for vector in texts.vectors] == [(1, 0), (2, 1)]
    assert (texts.adapters[0].name, texts.request_id, ids.adapters) == ("pirate", "r", ())


def test_one_text_needs_no_list(server: ViewServer, client: Client) -> None:
    client.embed("a whole text")
    assert [each.text for each in server.requests[0].inputs] == ["a whole text"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({}, "texts"),
        ({"texts": ["a"], "token_ids": [[1]]}, "texts"),
        ({"texts": [1]}, "inputs[0].text"),
        ({"token_ids": [[1], ["a"]]}, "inputs[1].token_ids.ids"),
        ({"token_ids": [[-1]]}, "inputs[0].token_ids.ids"),
        ({"texts": ["a"], "pooling": "max"}, "pooling"),
    ],
)
def test_wrong_arguments_never_reach_the_server(
    server: ViewServer, client: Client, wrong: Any, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.embed(**wrong)
    assert [each.field for each in caught.value.violations] == [field]
    assert server.requests == []


def test_a_watch_yields_the_states_with_both_clients(server: ViewServer, client: Client) -> None:
    async def awaited() -> list[EngineState]:
        async with AsyncClient(server.target) as other:
            return [each async for each in other.watch_engine(0.5)]

    found = list(client.watch_engine(0.5))
    assert asyncio.run(awaited()) == found
    assert [request.interval.ToMilliseconds() for request in server.requests] == [500, 500]
    first, second = found
    assert (first.steps, first.kv_blocks, first.max_rows) == (10, 64, 8)
    assert [(each.adapter_id, each.hidden, each.running) for each in first.adapters] == [
        ("pirate@2", False, 4),
        ("", False, 1),
        ("", True, 0),
    ]
    assert second.adapters == ()
    assert (second.time - first.time).total_seconds() == 1
    list(client.watch_engine())
    assert not server.requests[-1].HasField("interval")


def test_a_server_that_shuts_down_ends_a_watch_as_unavailable(
    server: ViewServer, client: Client
) -> None:
    server.ends = grpc.StatusCode.UNAVAILABLE
    watch = client.watch_engine()
    assert [next(watch).steps, next(watch).steps] == [10, 20]
    with pytest.raises(Unavailable):
        next(watch)
    with pytest.raises(InvalidRequest):
        client.watch_engine(float("nan"))


def test_a_server_without_the_calls_is_named_as_older() -> None:
    running = grpc.server(ThreadPoolExecutor(1))
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        with Client(f"127.0.0.1:{port}", timeout=30.0) as client, pytest.raises(Unsupported):
            client.embed("a")
    finally:
        running.stop(None).wait()


def test_embed_prints_a_line_of_numbers_for_each_text(server: ViewServer) -> None:
    found = run(server, "embed", "a", "b", "--adapter", "pirate", "--pooling", "mean")
    assert (found.exit_code, found.stdout) == (0, "0 0.5\n1 0.5\n")
    assert server.requests[-1].pooling == generation_pb2.POOLING_MEAN
    found = run(server, "embed", "-", "--json", stdin="eins\nzwei\ndrei\n")
    assert [each["values"] for each in json.loads(found.stdout)["vectors"]] == [
        [0.0, 0.5],
        [1.0, 0.5],
        [2.0, 0.5],
    ]
    assert [each.text for each in server.requests[-1].inputs] == ["eins", "zwei", "drei"]
    count = len(server.requests)
    assert run(server, "embed", stdin="").exit_code == 2
    assert run(server, "embed", "a", "--pooling", "max").exit_code == 2
    assert len(server.requests) == count


def test_top_prints_lines_elsewhere_than_on_a_terminal(server: ViewServer) -> None:
    found = run(server, "top", "--once", "--interval", "0.25")
    assert found.exit_code == 0, found.output
    figures, *entries = found.stdout.splitlines()
    assert "steps=10" in figures.split("\t")
    assert entries == ["pirate@2\t1\t3\t2", "(base)\t0\t1\t0", "(others)\t0\t0\t1"]
    assert server.requests[-1].interval.ToMilliseconds() == 250
    lines = run(server, "top", "--json").stdout.splitlines()
    assert [json.loads(line)["steps"] for line in lines] == [10, 20]
    assert run(server, "top", "--interval", "0.01").exit_code == 2


def test_top_draws_a_table_with_rates(server: ViewServer, client: Client) -> None:
    from rich.console import Console

    first, second = client.watch_engine()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(top.drawn(first, None))
    text = console.export_text()
    assert "rows 5/8, waiting 3, steps 10" in text
    assert "KV blocks 3/64 (+5 cached), adapters 2, 2.0 KiB of 1.0 MiB" in text
    (row,) = [line for line in text.splitlines() if "pirate@2" in line]
    assert row.split()[1:] == ["1", "3", "2", "######"]
    assert "(others)" in text
    console.print(top.drawn(second, first))
    assert "tokens/s 50 generated, 7 of prompts" in console.export_text()
    console.print(top.drawn(first, second))
    assert "tokens/s" not in console.export_text(), "the engine was restarted meanwhile"
