"""Clients that stand between callers and a server: each call carries its own caller's key."""

from __future__ import annotations

import pytest
from client.fake_server import FakeServer
from loraplex import AsyncClient, Client, InvalidRequest


def keys(server: FakeServer) -> list[str | None]:
    return [call.metadata.get("authorization") for call in server.calls]


def test_each_caller_has_its_own_key_and_one_connection_serves_all(server: FakeServer) -> None:
    with Client(server.target, key="own", metadata=[("x-site", "a")]) as client:
        one, other = client.for_caller("one"), client.for_caller("", [("x-more", "b")])
        for each in (one, other, client):
            each.get_model()
        assert keys(server) == ["Bearer one", None, "Bearer own"]
        assert [call.metadata["x-site"] for call in server.calls] == ["a"] * 3
        assert [call.metadata.get("x-more") for call in server.calls] == [None, "b", None]
        one.close()
        client.get_model()  # closing a caller's client leaves the connection open
        other.get_model()
        assert keys(server)[-1] is None


async def test_the_same_for_asyncio(server: FakeServer) -> None:
    async with AsyncClient(server.target, key="own") as client:
        one = client.for_caller("one")
        await one.get_model()
        await one.close()
        await client.get_model()
        assert keys(server) == ["Bearer one", "Bearer own"]


def test_a_key_that_would_leave_the_machine_unencrypted_is_refused() -> None:
    with Client("llm.example:50051", key="") as client:
        client.for_caller("")
        with pytest.raises(InvalidRequest) as caught:
            client.for_caller("secret-word")
        assert "secret-word" not in str(caught.value)
        with pytest.raises(InvalidRequest):
            client.for_caller("two words")
