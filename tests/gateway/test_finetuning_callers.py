"""Keys over HTTP: each caller has files and jobs of its own, within its roles and limits."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from gateway.training import BASE, TESTS, serving_http
from loraplex_server.access.principals import PrincipalLimits
from loraplex_server.access.roles import Role
from loraplex_server.training.files.shelf import MAX_STREAMS_PER_PEER
from rpc.harness import until
from rpc.tenants import tenant
from rpc.training_jobs import lines, settings
from security.callers import Callers, guarded, principal


@dataclass
class Shop:
    """The gateway's address, the server behind it, and its clients."""

    url: str
    server: Any
    clients: AsyncExitStack

    async def as_(self, name: str) -> openai.AsyncOpenAI:
        """The client of a principal, whose key is its name."""
        made = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=name, max_retries=0)
        return await self.clients.enter_async_context(made)


@asynccontextmanager
async def shop(folder: Path, patch: pytest.MonkeyPatch, *known: Any) -> AsyncIterator[Shop]:
    patch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
    (folder / "import").mkdir()
    async with (
        guarded(folder, patch, Callers(*known), **settings(folder)) as up,
        serving_http(str(up.server.address)) as url,
        AsyncExitStack() as clients,
    ):
        yield Shop(url, up.server, clients)


async def upload(client: openai.AsyncOpenAI, data: bytes) -> str:
    return (await client.files.create(file=("f", data), purpose="fine-tune")).id


async def test_files_and_jobs_exist_for_who_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop(tmp_path, monkeypatch, tenant("a"), tenant("b")) as up:
        a, b = await up.as_("a"), await up.as_("b")
        file = await upload(a, lines("hold"))
        job = await a.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="a-one")
        assert [each.id async for each in a.files.list()] == [file]
        assert [each.id async for each in b.files.list()] == []
        assert [each.id async for each in b.fine_tuning.jobs.list()] == []
        for call in (
            b.files.retrieve(file),
            b.files.content(file),
            b.files.delete(file),
            b.fine_tuning.jobs.retrieve(job.id),
            b.fine_tuning.jobs.cancel(job.id),
            b.fine_tuning.jobs.list_events(job.id),
            b.fine_tuning.jobs.checkpoints.list(job.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        with pytest.raises(openai.BadRequestError) as caught:
            await b.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="b-two")
        assert caught.value.param == "training_file"
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await a.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="b-two")
        assert "begin with 'a-'" in denied.value.message
        assert (await a.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


async def test_roles_and_limits_hold_over_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tenant("small", limits=PrincipalLimits(store_bytes=100))
    reader = principal("reader", [Role.READ])
    async with shop(tmp_path, monkeypatch, small, reader) as up:
        client, other = await up.as_("small"), await up.as_("reader")
        file = await upload(client, b"x" * 100)
        with pytest.raises(openai.RateLimitError) as caught:
            await upload(client, b"x")
        assert caught.value.code == "rate_limit_exceeded"
        assert (await other.files.content(file)).content == b"x" * 100  # who sees all, may read
        with pytest.raises(openai.PermissionDeniedError):
            await upload(other, b"x")
        with pytest.raises(openai.PermissionDeniedError):
            await other.files.delete(file)
        stranger = await up.as_("stranger")
        with pytest.raises(openai.AuthenticationError):
            await stranger.files.list()
        with pytest.raises(openai.AuthenticationError):
            await upload(stranger, b"x" * 1_000_000)
        async with httpx2.AsyncClient(base_url=up.url) as http:
            assert (await http.get("/v1/fine_tuning/jobs")).status_code == 401


class HalfSent:
    """A form whose file does not end before `end`."""

    def __init__(self, url: str, key: str) -> None:
        self._address = url.removeprefix("http://").split(":")
        part = b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n'
        self._form = part % (b"purpose", b"") + b"fine-tune\r\n"
        self._form += part % (b"file", b'; filename="f"') + b"y" * 1000
        self._rest = b"y\r\n--x--\r\n"
        self._head = (
            "POST /v1/files HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"authorization: Bearer {key}\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            f"content-length: {len(self._form) + len(self._rest)}\r\n\r\n"
        ).encode()
        self._ends = asyncio.Event()

    def end(self) -> None:
        """Sends the rest of the file."""
        self._ends.set()

    async def answer(self) -> tuple[int, Any]:
        """Sends the form; returns the status and the body of the answer, however early."""
        reader, writer = await asyncio.open_connection(*self._address)
        writer.write(self._head + self._form)

        async def finish() -> None:
            await self._ends.wait()
            writer.write(self._rest)

        finishing = asyncio.create_task(finish())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finishing.cancel()
        writer.close()
        return int(head.split()[1]), json.loads(body)


async def test_one_callers_uploads_leave_places_to_other_callers_of_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop(tmp_path, monkeypatch, tenant("a"), tenant("b")) as up:
        a, b = await up.as_("a"), await up.as_("b")
        half = [HalfSent(up.url, "a") for _ in range(MAX_STREAMS_PER_PEER)]
        answers = [asyncio.ensure_future(each.answer()) for each in half]

        shelf = up.server._training._shelf
        await until(lambda: len(shelf._arriving) == MAX_STREAMS_PER_PEER)
        with pytest.raises(openai.InternalServerError) as caught:
            await upload(a, b"x")
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        assert await upload(b, b"x")
        for each in half:
            each.end()
        assert {status for status, _ in await asyncio.gather(*answers)} == {200}
        assert await upload(a, b"x")


async def test_an_upload_that_is_refused_before_it_has_arrived_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_gateway.files.form._DISCARD_SECONDS", 0.1)
    async with shop(tmp_path, monkeypatch, principal("reader", [Role.READ])) as up:
        status, body = await HalfSent(up.url, "reader").answer()
        assert (status, body["error"]["code"]) == (403, "permission_denied")
