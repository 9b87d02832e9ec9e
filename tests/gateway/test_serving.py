"""Connections of the gateway's own listening socket."""

from __future__ import annotations

import asyncio
import socket

import pytest
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
