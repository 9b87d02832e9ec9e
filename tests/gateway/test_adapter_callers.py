"""Adapters over HTTP where callers have keys: the server decides, and nothing is told before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway.adapter_gateway import checked, gateway, http_to
from loraplex_server.access.identity.key_file import KeyFile
from rpc.harness import write_adapter

PRINCIPALS = """
[principals.operator]
roles = ["infer", "read", "register", "admin", "train"]
adapters = "*"
imports = ""

[principals.reader]
roles = ["read"]
adapters = "*"

[principals.search]
roles = ["infer", "read", "register"]
adapters = "team=search"
name_prefix = "search-"
imports = "search"
"""


class Site:
    """A gateway whose callers have keys, and what each may send."""

    def __init__(self, root: Path, callers: dict[str, httpx2.AsyncClient], up: Any) -> None:
        self.root = root
        self.callers = callers
        self.up = up

    async def load(self, caller: str, name: str, path: str, status: int = 200) -> Any:
        body = {"lora_name": name, "lora_path": path}
        reply = await self.callers[caller].post("/v1/load_lora_adapter", json=body)
        return checked(reply, status)

    async def names(self, caller: str) -> list[str]:
        listed = checked(await self.callers[caller].get("/v1/adapters"), 200)
        return [each["name"] for each in listed["data"]]


@asynccontextmanager
async def site_with(folder: Path, **settings: Any) -> AsyncIterator[Site]:
    (folder / "principals.toml").write_text(PRINCIPALS)
    keys = {
        name: KeyFile(folder / "keys.json").add(name)[1]
        for name in ("operator", "reader", "search")
    }
    server = {"principals": folder / "principals.toml", "keys": folder / "keys.json"}
    async with gateway(folder, settings, **server) as found:
        up, root = found.up, found.root
        async with (
            http_to(up, root, settings, keys["operator"]) as operator,
            http_to(up, root, settings, keys["reader"]) as reader,
            http_to(up, root, settings, keys["search"]) as search,
        ):
            callers = {"": found.http, "operator": operator, "reader": reader, "search": search}
            yield Site(root, callers, up)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with site_with(tmp_path) as found:
        yield found


async def test_who_may_not_register_learns_nothing_of_files(site: Site) -> None:
    write_adapter(site.root / "there")
    for caller, status in (("", 401), ("reader", 403)):
        said = [
            await site.load(caller, "x", path, status)
            for path in ("there", "missing", str(site.root / "there"), "/etc", "hf://org/x")
        ]
        assert all(each["message"] == said[0]["message"] for each in said)
        reply = await site.callers[caller].post("/v1/unload_lora_adapter", json={"lora_name": "x"})
        assert reply.status_code in (401, 404)
    assert await site.names("operator") == []


async def test_no_byte_of_an_upload_is_read_from_who_may_not_register(site: Site) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"x" * 1000

    headers = {"content-type": "multipart/form-data; boundary=x"}
    for caller, status in (("", 401), ("reader", 403)):
        reply = await site.callers[caller].post("/v1/adapters", content=body(), headers=headers)
        assert reply.status_code == status
    assert read == 0


async def test_a_tenant_has_its_own_names_labels_folders_and_nothing_of_others(site: Site) -> None:
    write_adapter(site.root / "one")
    write_adapter(site.root / "two", seed=1)
    write_adapter(site.up.folder / "import" / "search" / "three", seed=2)
    write_adapter(site.up.folder / "import" / "four", seed=3)
    await site.load("operator", "ops", "one")
    await site.load("search", "search-a", "two")
    await site.load("search", "search-org/B", "two")
    await site.load("search", "search-c", "three")
    assert (await site.load("search", "other", "two", 403))["error"]["param"] is None
    await site.load("search", "search-d", "four", 404)
    names = await site.names("search")
    assert names[0] == "search-a"
    assert names[1] == "search-c"
    assert names[2].startswith("search-org-b-")
    assert len(names) == 3
    assert len(await site.names("operator")) == 4
    for call in (
        site.callers["search"].get("/v1/adapters/ops"),
        site.callers["search"].get("/v1/adapters/ops/versions"),
        site.callers["search"].post("/v1/unload_lora_adapter", json={"lora_name": "ops"}),
    ):
        assert (await call).status_code == 404
    assert "ops" in await site.names("operator")


async def test_who_may_register_but_not_move_can_load_and_unload(site: Site) -> None:
    write_adapter(site.root / "one")
    for _ in range(2):
        await site.load("search", "search-a", "one")
    search = site.callers["search"]
    assert (await search.post("/v1/adapters/search-a/pin")).status_code == 403
    assert (await search.post("/v1/adapters/search-a/unload")).status_code == 403
    body = {"lora_name": "search-a"}
    assert (await search.post("/v1/unload_lora_adapter", json=body)).status_code == 200
    assert await site.names("search") == []


async def test_no_upload_is_left_behind_by_refusals(site: Site) -> None:
    write_adapter(site.up.folder / "import" / "search" / "any")
    for path in ("missing", "/etc", "hf://org/x", "s3://bucket/../x"):
        body = {"lora_name": "search-x", "lora_path": path}
        reply = await site.callers["search"].post("/v1/load_lora_adapter", json=body)
        assert reply.status_code in (400, 403, 404), path
    folder = site.up.server._config.store / "uploads"
    assert [each.name for each in folder.iterdir()] == ["lock"]
