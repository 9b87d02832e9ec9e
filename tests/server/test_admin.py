"""The admin port: its answers, and clients that only hold connections."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection

import pytest
from loraplex_server.runtime import admin
from loraplex_server.runtime.admin import MAX_HTTP_CONNECTIONS, MetricsServer
from prometheus_client import CollectorRegistry, Counter

HALF = b"GET /metrics HTTP/1.1\r\nHost: "


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Counter("some", "more than a socket takes" * 100_000, registry=registry)
    server = MetricsServer("127.0.0.1", 0, registry)
    yield server
    server.stop()


def scrape(server: MetricsServer, **headers: str) -> tuple[str, bytes]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/metrics", headers=headers)
    reply = connection.getresponse()
    assert reply.status == 200
    body = reply.read()
    connection.close()
    return reply.headers["content-type"], body


def threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def test_both_formats_and_compression_are_served(server: MetricsServer) -> None:
    kind, body = scrape(server)
    assert kind.startswith("text/plain")
    assert b"some_total 0.0" in body
    kind, body = scrape(server, Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    _, packed = scrape(server, **{"Accept-Encoding": "gzip"})
    assert b"some_total 0.0" in gzip.decompress(packed)


@pytest.mark.fault("admin-threads")
@pytest.mark.parametrize("sent", [b"", HALF, b"GET /metrics HTTP/1.1\r\n\r\n"])
def test_connections_that_are_only_held_cost_no_threads_and_no_scrape(
    server: MetricsServer, sent: bytes
) -> None:
    with ExitStack() as stack:
        for _ in range(400):
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            held.connect(("127.0.0.1", server.port))
            held.sendall(sent)
        assert threads() <= MAX_HTTP_CONNECTIONS
        for _ in range(3):
            assert b"some_total 0.0" in scrape(server)[1]
        assert server.open_connections <= MAX_HTTP_CONNECTIONS
        assert threads() <= MAX_HTTP_CONNECTIONS


@pytest.mark.fault("admin-threads")
def test_no_connection_outlives_the_limit(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "HTTP_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", server.port)) as held:
        held.settimeout(30)
        until(lambda: server.open_connections == 1)
        ended = False
        while not ended:
            try:
                held.sendall(b"x")  # a byte now and then
            except OSError:
                ended = True
            time.sleep(0.05)
        assert b"some_total 0.0" in scrape(server)[1]
        until(lambda: threads() == 0)


def test_a_stopped_server_holds_nothing(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as held:
        until(lambda: server.open_connections == 1)
        server._server.close_older(0.0)
        held.settimeout(30)
        assert held.recv(1) == b""
        until(lambda: threads() == 0)
