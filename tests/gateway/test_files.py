"""`/v1/files` as the openai package and plain HTTP use it: streamed, whole, refused by name."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio
from gateway.training import FineTuning, declared, fine_tuning
from loraplex_gateway.app import build
from loraplex_gateway.settings import GatewaySettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 40 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FineTuning]:
    async with fine_tuning(tmp_path_factory.mktemp("server"), training_data=LIMIT) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(up: FineTuning) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{up.url}/v1", api_key="any", max_retries=0, http_client=declared()
    ) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def http(up: FineTuning) -> AsyncIterator[httpx2.AsyncClient]:
    async with declared(base_url=up.url) as made:
        yield made


async def test_a_file_goes_up_and_comes_back(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    path = tmp_path / "sét 日本.jsonl"
    path.write_bytes(data)
    file = await client.files.create(file=path, purpose="fine-tune")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        len(data), path.name, "fine-tune", "processed",
    )  # fmt: skip
    assert file.id.startswith("file-")
    assert await client.files.retrieve(file.id) == file
    assert (await client.files.content(file.id)).content == data
    assert file.id in [each.id async for each in client.files.list()]
    gone = await client.files.delete(file.id)
    assert (gone.id, gone.deleted) == (file.id, True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            await call(file.id)
        assert caught.value.code == "file_not_found"


async def test_files_are_listed_page_by_page_in_both_orders(client: openai.AsyncOpenAI) -> None:
    made = [
        (await client.files.create(file=(f"{i}.jsonl", b"x%d" % i), purpose="fine-tune")).id
        for i in range(3)
    ]
    newest = [each.id async for each in client.files.list(limit=1)]
    assert newest[:3] == made[::-1]
    oldest = [each.id async for each in client.files.list(limit=1, order="asc")]
    assert oldest == newest[::-1]
    page = await client.files.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    assert (await client.files.list(purpose="batch")).data == []
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.files.list(extra_query=wrong)
        assert caught.value.param == next(iter(wrong))
    with pytest.raises(openai.NotFoundError):
        await client.files.list(after="file-x")


def form(*parts: tuple[str, str, bytes]) -> dict[str, Any]:
    """A body of parts, each with its name, further disposition and content."""
    body = b"".join(
        b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), more.encode(), content)
        for name, more, content in parts
    )
    headers = {"content-type": "multipart/form-data; boundary=B"}
    return {"content": body + b"--B--\r\n", "headers": headers}


FILE = ("file", '; filename="a/b\\\\c.jsonl"', b'{"text": "x"}\n')
PURPOSE = ("purpose", "", b"fine-tune")


async def test_fields_may_come_after_the_file(http: httpx2.AsyncClient) -> None:
    for parts in ((FILE, PURPOSE), (PURPOSE, FILE)):
        reply = await http.post("/v1/files", **form(*parts))
        assert reply.status_code == 200, reply.text
        assert (reply.json()["bytes"], reply.json()["filename"]) == (14, "c.jsonl")


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ((FILE,), "purpose"),
        ((PURPOSE,), "file"),
        ((), "file"),
        ((FILE, ("purpose", "", b"assistants")), "purpose"),
        ((("purpose", "", b"batch"), FILE), "purpose"),
        ((FILE, PURPOSE, ("expires_after[anchor]", "", b"created_at")), "expires_after[anchor]"),
        ((PURPOSE, FILE, FILE), "file"),
        ((("purpose", "", b"x" * 5000), FILE), "purpose"),
        ((PURPOSE, ("file", '; filename="empty"', b"")), "file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_wrong_with_a_form_is_refused_and_nothing_is_kept(
    http: httpx2.AsyncClient, parts: Any, param: str
) -> None:
    before = (await http.get("/v1/files")).json()
    reply = await http.post("/v1/files", **form(*parts))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert (await http.get("/v1/files")).json() == before


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"--B--\r\n", "application/json"),
        (b"x", "multipart/form-data"),
        (b"no boundary here", "multipart/form-data; boundary=B"),
        (b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nhalf',
         "multipart/form-data; boundary=B"),
        (b"--B\r\n" + b"x" * 9000, "multipart/form-data; boundary=B"),
    ],
)  # fmt: skip
async def test_what_is_no_form_is_refused(
    http: httpx2.AsyncClient, content: bytes, kind: str
) -> None:
    before = (await http.get("/v1/files")).json()
    reply = await http.post("/v1/files", content=content, headers={"content-type": kind})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert (await http.get("/v1/files")).json() == before


async def test_a_file_that_is_too_large_is_refused_with_the_servers_words(
    client: openai.AsyncOpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.files.create(file=("big", b"x" * (LIMIT + 1)), purpose="fine-tune")
    assert caught.value.param == "file"
    assert "training_data" in caught.value.message


async def test_a_large_file_takes_little_memory_in_either_direction(up: FineTuning) -> None:
    """In this process, without a client's own memory: the application is called directly."""
    app = build(GatewaySettings(target=str(up.trains.up.server.address)))
    piece, count = os.urandom(1 << 20), 38
    parts = [b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n']
    parts += [piece] * count
    end = b'\r\n--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--B--\r\n'

    def scope(method: str, path: str) -> dict[str, Any]:
        kind = (b"content-type", b"multipart/form-data; boundary=B")
        return {
            "type": "http", "method": method, "path": path, "headers": [kind],
            "query_string": b"", "http_version": "1.1", "scheme": "http",
            "server": ("t", 80), "client": ("c", 1), "root_path": "", "raw_path": path.encode(),
        }  # fmt: skip

    sent = iter([*parts, end])
    got: list[Any] = []
    size = 0

    async def receive() -> dict[str, Any]:
        body = next(sent, None)
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": body is not end}

    async def send(message: dict[str, Any]) -> None:
        nonlocal size
        size += len(message.get("body", b""))
        if size < 1 << 20:
            got.append(message)

    tracemalloc.start()
    try:
        await app(scope("POST", "/v1/files"), receive, send)
        assert got[0]["status"] == 200, got
        file = httpx2.Response(200, content=got[1]["body"]).json()
        assert file["bytes"] == count << 20
        got.clear()
        size = 0
        await app(scope("GET", f"/v1/files/{file['id']}/content"), receive, send)
        assert size == count << 20
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


async def test_a_damaged_file_does_not_arrive_whole(
    up: FineTuning, client: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    small = await client.files.create(file=("a", b"x" * 9), purpose="fine-tune")
    large = await client.files.create(file=("b", os.urandom(2_000_000)), purpose="fine-tune")
    folder = up.trains.up.folder / "training" / "files"
    for file in (small, large):
        path = folder / file.id.removeprefix("file-") / "data"
        path.write_bytes(b"!" + path.read_bytes()[1:])
    reply = await http.get(f"/v1/files/{small.id}/content")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "data_corrupt")
    with pytest.raises(httpx2.HTTPError):
        await http.get(f"/v1/files/{large.id}/content")
