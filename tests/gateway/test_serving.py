"""Connections of the gateway's own listening socket."""

from __future__ import annotations

import asyncio
import socket

import pytest
from gateway.harness import web
from loraplex_gateway.serving import CannotListen, listen
from loraplex_gateway.settings import GatewaySettings


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_no_answer_waits_for_the_client_to_acknowledge_the_one_before(host: str) -> None:
    """The kernel may delay small packets until then, which takes 40 ms on an idle connection."""
    try:
        listening = listen(GatewaySettings(host=host, port=0))
    except CannotListen:
        pytest.skip(f"this machine has no {host}")
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        told.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(accepted, sock=listening):
        _, client = await asyncio.open_connection(*listening.getsockname()[:2])
        try:
            assert await asyncio.wait_for(told, 60) != 0
        finally:
            client.close()


async def test_only_pages_of_the_named_origins_may_call() -> None:
    async with web("127.0.0.1:1", compared=False, cors_origins=("https://a.example",)) as found:
        for origin, is_named in (("https://a.example", True), ("https://b.example", False)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            before = await found.http.request("OPTIONS", "/v1/completions", headers=asked)
            assert (before.status_code == 200) is is_named
            answer = await found.http.get("/version", headers={"Origin": origin})
            assert answer.status_code == 200
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (origin if is_named else None)
    async with web("127.0.0.1:1", compared=False) as found:
        answer = await found.http.get("/version", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in answer.headers
