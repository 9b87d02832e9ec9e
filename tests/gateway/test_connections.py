"""Whatever is sent to its port, the gateway goes on: bounds on size, time and connections.

What is malformed is refused, and nothing of it is taken for a request of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from client.fake_server import FakeServer
from gateway.harness import Web, web
from loraplex.v1 import model_pb2
from loraplex_gateway import connections
from starlette.responses import StreamingResponse

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEXT = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
AFTERWARDS = b"once that is answered"
POST = b"POST /ping HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[Web]:
    async with web("127.0.0.1:1", compared=False) as found:  # no server is needed
        yield found


async def connect(site: Web) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = site.url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection is closed; the test's own timeout bounds it."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            found += piece
    return found


async def sent(site: Web, data: bytes) -> bytes:
    """What the gateway answers before it closes the connection."""
    reader, writer = await connect(site)
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(data), 1 << 16):
            writer.write(data[start : start + (1 << 16)])
            await writer.drain()
    found = await rest(reader)
    writer.close()
    return found


async def answers(site: Web) -> bool:
    return (await site.get("/version")).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
        b"Content-Length: 0, 44\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: +5\r\n\r\nhello",
        b"Content-Length: 0x5\r\n\r\nhello",
        b"Content-Length : 5\r\n\r\nhello",
        b"X: a\r\n folded: b\r\n\r\n",
        b"X: a\nY: b\r\n\r\n",
        b"X\x00: a\r\n\r\n",
        b"Host: elsewhere\r\n\r\n",
    ],
)
@pytest.mark.fault("request-of-two-meanings")
async def test_a_request_with_two_meanings_is_refused_with_all_that_follows(
    site: Web, head: bytes
) -> None:
    found = await sent(site, POST + head + NEXT)
    assert found.startswith(b"HTTP/1.1 400 "), found
    assert found.count(b"HTTP/1.1 ") == 1
    assert await answers(site)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT elsewhere:80 HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
        b"GET /version\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /version HTTP/9.9\r\n\r\n",
        b"canary-garbage\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_and_not_logged(
    site: Web, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert (await sent(site, data)).startswith(b"HTTP/1.1 400 ")
    assert not caplog.records
    assert await answers(site)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GET + b"X: " + b"a" * (1 << 20) + b"\r\n\r\n",
        GET + b"a" * (1 << 20) + b": x\r\n\r\n",
        GET + b"X: a\r\n" * (1 << 17) + b"\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: " + b"a" * (1 << 20),
    ],
    ids=["url", "value", "name", "number", "trailer"],
)
@pytest.mark.fault("head-unbounded")
async def test_heads_are_bounded(site: Web, data: bytes) -> None:
    found = await sent(site, data)
    assert b" 200 " not in found[:20] or data.startswith(POST)
    assert await answers(site)


async def test_a_head_of_the_allowed_size_is_read(site: Web) -> None:
    headers = {f"x-{n}": "v" * 400 for n in range(100)}
    assert (await site.http.get("/version", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        GET,
        b"GET /ver",
        NEXT + AFTERWARDS + b"\r\n",
        NEXT + b"GET /ver",
        POST + b"Content-Length: 1000000\r\n\r\nx",
    ],
    ids=["nothing", "empty line", "headers", "line", "after one", "second", "answered before"],
)
@pytest.mark.fault("head-without-end")
async def test_a_request_that_does_not_arrive_is_given_up(
    site: Web, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    reader, writer = await connect(site)
    first, _, then = data.partition(AFTERWARDS)
    writer.write(first)
    if then:
        await reader.readuntil(b"}")
        writer.write(then)
    await rest(reader)  # ends with the connection, long before the time of an idle one
    writer.close()
    assert await answers(site)


async def test_what_arrives_slowly_but_in_time_is_answered(site: Web) -> None:
    reader, writer = await connect(site)
    for byte in NEXT:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.fault("http-connections-unbounded")
async def test_connections_are_bounded_and_those_open_go_on() -> None:
    async with web("127.0.0.1:1", compared=False, max_connections=4) as site:
        kept = [await connect(site) for _ in range(4)]
        for reader, writer in kept:
            writer.write(NEXT)
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
        for _ in range(3):  # a spare one takes a single request, which must need no server
            reader, writer = await connect(site)
            writer.write(NEXT + NEXT)
            answer = await rest(reader)
            assert answer.count(b"HTTP/1.1 200 ") == 1
            assert b"\r\nconnection: close\r\n" in answer
            writer.close()
        reader, writer = await connect(site)
        writer.write(NEXT.replace(b"/version", b"/v1/models"))
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"overloaded"' in answer
        writer.close()
        spare = [await connect(site) for _ in range(connections.SPARE_CONNECTIONS)]
        reader, writer = await connect(site)
        writer.write(NEXT)
        assert await rest(reader) == b""
        writer.close()
        for _, writer in spare:
            writer.close()
        for reader, writer in kept:
            writer.write(NEXT)
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
        for _, writer in kept:
            writer.close()
            await writer.wait_closed()
        while True:  # the test's own timeout bounds it
            with contextlib.suppress(Exception):
                assert await answers(site)
                return


@pytest.mark.fault("http-reader-stalled")
async def test_a_reader_who_takes_nothing_is_given_up_with_its_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.2)
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with web("127.0.0.1:1", compared=False) as site:
        for route in site.app.routes:
            if getattr(route, "path", "") == "/version":
                route.app = StreamingResponse(endless())
        reader, writer = await connect(site)
        writer.write(POST.replace(b"/ping", b"/version").replace(b"POST", b"GET") + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        await ended.wait()
        writer.close()


@pytest.mark.fault("form-without-end")
@pytest.mark.parametrize("path", ["/v1/files", "/v1/adapters"])
async def test_a_form_that_comes_too_slowly_is_given_up(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_gateway.wire.bodies.SILENT_SECONDS", 0.3)
    server = FakeServer(model=model_pb2.Model(name="fake", max_context=64))
    server.start()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
        "content-type: multipart/form-data; boundary=x\r\n\r\n"
    )
    part = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n'

    async def drips(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.02)

    try:
        async with web(server.target, compared=False) as site:
            reader, writer = await connect(site)
            writer.write(head.encode() + f"{len(part):x}\r\n".encode() + part + b"\r\n")
            dripping = asyncio.create_task(drips(writer))
            found = await reader.readuntil(b"}}")
            assert found.startswith(b"HTTP/1.1 408 "), found
            dripping.cancel()
            writer.close()
    finally:
        server.stop()
