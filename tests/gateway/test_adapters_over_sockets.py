"""Adapters over real connections: events that come as they happen, and uploads that break off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway.harness import Web, gateway
from loraplex.v1 import adapter_pb2 as pb
from rpc.harness import Running, write_adapter

OPENING = b'--x\r\ncontent-disposition: form-data; name="weights"; filename="w"\r\n\r\n'


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[tuple[Running, Web]]:
    async with gateway(tmp_path, web_adapter_root=tmp_path) as found:
        yield found


async def open_uploads(up: Running) -> int:
    return len((await up.adapters.ListUploads(pb.ListUploadsRequest())).uploads)


async def test_changes_come_as_events_and_a_reader_who_leaves_ends_the_watch(
    site: tuple[Running, Web], tmp_path: Path
) -> None:
    up, web = site
    write_adapter(tmp_path / "one")
    async with web.http.stream("GET", "/v1/adapter_events") as reply:
        lines = reply.aiter_lines()

        async def following() -> tuple[str, Any]:
            name = ""
            async for line in lines:
                kind, _, text = line.partition(": ")
                if kind == "data":
                    return name, json.loads(text)
                name = text if kind == "event" else name
            raise AssertionError("the stream has ended")

        assert await following() == ("table", {"adapters": [], "aliases": {}, "resync": False})
        body = {"lora_name": "Org/X", "lora_path": "one"}
        assert (await web.post("/v1/load_lora_adapter", body)).status_code == 200
        kinds = set()
        while "registered" not in kinds:
            name, change = await following()
            assert name == "change"
            kinds.add(change["kind"])
        assert change["adapter"]["model"] == "Org/X"
    while up.metric("open_calls"):  # noqa: ASYNC110 - the test's own timeout bounds it
        await asyncio.sleep(0.01)


async def test_an_upload_whose_sender_leaves_keeps_nothing(
    site: tuple[Running, Web], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, web = site
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    sent = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield OPENING + b"x" * (3 << 20)
        sent.set()
        await asyncio.Event().wait()

    headers = {"content-type": "multipart/form-data; boundary=x"}
    async with httpx2.AsyncClient(base_url=web.url, timeout=60, trust_env=False) as leaving:
        task = asyncio.create_task(leaving.post("/v1/adapters", content=body(), headers=headers))
        await sent.wait()
        while not await open_uploads(up):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    while await open_uploads(up):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert list(place.iterdir()) == []


async def test_an_upload_of_many_megabytes_arrives_whole(
    site: tuple[Running, Web], tmp_path: Path
) -> None:
    up, web = site
    folder = write_adapter(tmp_path / "one", pad="x" * 500_000)
    files = [
        ("config", ("adapter_config.json", (folder / "adapter_config.json").read_bytes())),
        ("weights", ("adapter_model.safetensors", b"\x00" * (20 << 20))),
    ]
    reply = await web.http.post("/v1/adapters", files=files, data={"validate_only": "true"})
    assert reply.status_code == 200, reply.text
    assert reply.json()["findings"]
    assert await open_uploads(up) == 0
