"""The adapter endpoints of other servers: what they accept, answer, refuse and leave behind."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway.adapter_gateway import Gateway, checked, gateway
from loraplex_gateway import adapters
from loraplex_gateway.context import Context
from loraplex_gateway.settings import GatewaySettings
from rpc.harness import write_adapter
from starlette.routing import Route

from gateway import specification

ADDED = "Success: LoRA adapter '{}' added successfully."
REMOVED = "Success: LoRA adapter '{}' removed successfully."
FOREIGN = [
    "org/Name_v1",
    "org/name@main",
    "/mnt/Lora_A",
    "publishers/ns/models/x",
    "UPPER",
    "base:suffix",
    "日本/アダプタ",
    "a b",
]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with gateway(tmp_path) as found:
        yield found


async def test_a_load_registers_loads_and_lists_and_an_unload_takes_it_all_back(
    site: Gateway,
) -> None:
    folder = site.write("one")
    said = await site.post("/v1/load_lora_adapter", lora_name="one", lora_path=str(folder))
    assert said == ADDED.format("one")
    assert (await site.adapter("one"))["state"] == "resident"
    assert await site.models() == ["one"]
    said = await site.post("/v1/unload_lora_adapter", lora_name="one")
    assert said == REMOVED.format("one")
    assert await site.models() == []
    assert site.up.metric("adapters", state="resident") == 0
    restored = checked(await site.http.post("/v1/adapters/one/restore"), 200)
    assert (restored["id"], restored["state"]) == ("one@1", "stored")


async def test_a_load_is_idempotent_by_digest(site: Gateway) -> None:
    folder = site.write("one")
    for _ in range(2):
        await site.post("/v1/load_lora_adapter", lora_name="one", lora_path="one")
    shutil.copytree(folder, site.root / "copy")
    await site.post("/v1/load_lora_adapter", lora_name="one", lora_path=str(site.root / "copy"))
    found = checked(await site.http.get("/v1/adapters/one/versions"), 200)
    assert [each["version"] for each in found["data"]] == [1]
    assert checked(await site.http.get("/v1/adapters"), 200)["data"] == found["data"]


async def test_other_bytes_are_refused_in_both_shapes_unless_they_are_to_replace(
    site: Gateway,
) -> None:
    site.write("one")
    site.write("two", seed=1)
    await site.post("/v1/load_lora_adapter", lora_name="x", lora_path="one")
    body = await site.post("/v1/load_lora_adapter", 400, lora_name="x", lora_path="two")
    assert body["type"] == body["error"]["type"] == "InvalidUserInput"
    assert body["message"] == body["error"]["message"]
    assert "has already been loaded. If you want to load the adapter in place" in body["message"]
    assert body["error"]["code"] == 400
    assert (await site.adapter("x"))["version"] == 1
    await site.post("/v1/load_lora_adapter", lora_name="x", lora_path="two", load_inplace=True)
    moved = await site.adapter("x")
    assert (moved["version"], moved["state"]) == (2, "resident")


async def test_an_id_that_is_no_name_is_listed_found_and_unloaded_as_it_is(site: Gateway) -> None:
    site.write("one")
    for model in FOREIGN:
        for _ in range(2):
            await site.post("/v1/load_lora_adapter", lora_name=model, lora_path="one")
        assert await site.models() == [model]
        (info,) = checked(await site.http.get("/v1/adapters"), 200)["data"]
        assert info["model"] == model
        assert info["labels"]["loraplex.dev/model-id"] == model
        await site.post("/v1/unload_lora_adapter", lora_name=model)
        assert await site.models() == []


async def test_what_cannot_be_an_id_is_refused(site: Gateway) -> None:
    site.write("one")
    base = checked(await site.http.get("/v1/models"), 200)["data"][0]["id"]
    for model in ("", "x" * 257, "a\nb", "one@3", base):
        body = await site.post("/v1/load_lora_adapter", 400, lora_name=model, lora_path="one")
        assert body["type"] == "InvalidUserInput", model
    assert await site.models() == []


async def test_unknown_names_files_and_fields_have_the_statuses_of_vllm(site: Gateway) -> None:
    post = site.post
    body = await post("/v1/unload_lora_adapter", 404, lora_name="none")
    assert body["error"]["type"] == body["type"] == "NotFoundError"
    for missing in ("none", str(site.root / "none"), "deep/er"):
        body = await post("/v1/load_lora_adapter", 404, lora_name="x", lora_path=missing)
        assert body["type"] == "NotFoundError", missing
    (site.root / "empty").mkdir()
    for given in ({}, {"lora_name": "x"}, {"lora_name": 3, "lora_path": "one"}):
        assert (await post("/v1/load_lora_adapter", 400, **given))["type"] == "InvalidUserInput"
    await post("/v1/load_lora_adapter", 400, lora_name="x", lora_path="empty")
    await post("/v1/load_lora_adapter", 400, lora_name="x", lora_path="one", scale=2)
    reply = await site.http.post("/v1/load_lora_adapter", content=b"not JSON")
    assert checked(reply, 400)["object"] == "error"
    await post("/v1/unload_lora_adapter", 400)


async def test_nothing_outside_of_the_allowed_folders_is_read(
    site: Gateway, tmp_path: Path
) -> None:
    outside = write_adapter(tmp_path / "outside")
    inside = site.write("inside")
    (site.root / "link").symlink_to(outside)
    (site.root / "half").mkdir()
    shutil.copy(inside / "adapter_config.json", site.root / "half")
    (site.root / "half" / "adapter_model.safetensors").symlink_to(
        outside / "adapter_model.safetensors"
    )
    paths = [
        str(outside), str(tmp_path / "missing"), "../outside", str(site.root / ".." / "outside"),
        "link", str(site.root / "link"), "half", f"file://{outside}", "/", "/etc", str(site.root),
    ]  # fmt: skip
    for path in paths:
        reply = await site.http.post(
            "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}
        )
        assert reply.status_code in (403, 404), (path, reply.text)
    # What exists outside is answered as what does not.
    for there, missing in ((str(outside), str(outside) + "-"), ("../outside", "../missing")):
        said = [
            await site.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": at})
            for at in (there, missing)
        ]
        assert said[0].status_code == said[1].status_code
        assert said[0].json()["message"] == said[1].json()["message"]
    assert await site.models() == []


async def test_links_within_the_folder_are_followed_as_a_hub_cache_needs(site: Gateway) -> None:
    files = site.write("blobs/real")
    snapshot = site.root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/real/{file.name}")
    await site.post("/v1/load_lora_adapter", lora_name="x", lora_path=str(snapshot))
    assert await site.models() == ["x"]


async def test_what_is_no_regular_file_or_too_large_is_refused_before_it_is_read(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path, {"max_upload_bytes": 2000}) as site:
        fifo = site.write("fifo")
        (fifo / "adapter_config.json").unlink()
        os.mkfifo(fifo / "adapter_config.json")
        site.write("large", rank=8)
        huge = site.write("huge")
        with (huge / "adapter_config.json").open("ab") as file:
            file.truncate(1 << 30)
        for name in ("fifo", "large", "huge"):
            await site.post("/v1/load_lora_adapter", 400, lora_name="x", lora_path=name)


async def test_paths_below_the_servers_import_root_are_registered_there(tmp_path: Path) -> None:
    async with gateway(tmp_path, {"adapter_root": None, "import_root": "/mnt/lora"}) as site:
        write_adapter(tmp_path / "import" / "a" / "b")
        for name, path in (("x", "a/b"), ("y", "/mnt/lora/a/b"), ("z", "/mnt/lora/c/../a/b/")):
            await site.post("/v1/load_lora_adapter", lora_name=name, lora_path=path)
        assert await site.models() == ["x", "y", "z"]
        for path in ("/mnt/lora", "/mnt/lora/../x", "/mnt/lorax/a"):
            await site.post("/v1/load_lora_adapter", 403, lora_name="w", lora_path=path)
        await site.post("/v1/load_lora_adapter", 404, lora_name="w", lora_path="../import/a/b")


async def test_loads_of_one_name_at_once_make_one_version(site: Gateway) -> None:
    site.write("one")
    body = {"lora_name": "org/x", "lora_path": "one"}
    replies = await asyncio.gather(
        *(site.http.post("/v1/load_lora_adapter", json=body) for _ in range(6))
    )
    assert {reply.status_code for reply in replies} == {200}
    (info,) = checked(await site.http.get("/v1/adapters"), 200)["data"]
    assert info["version"] == 1


async def test_an_unload_takes_a_pinned_adapter_from_the_device(site: Gateway) -> None:
    site.write("one")
    await site.post("/load_lora_adapter", lora_name="one", lora_path="one", pinned=True)
    assert (await site.adapter("one"))["pinned"]
    await site.post("/v1/unload_lora_adapter", lora_name="one")
    assert site.up.metric("adapters", state="pinned") == 0
    assert site.up.metric("adapters", state="resident") == 0


async def test_an_alias_is_unloaded_alone_and_a_version_and_the_base_not_at_all(
    site: Gateway,
) -> None:
    site.write("one")
    await site.post("/v1/load_lora_adapter", lora_name="one", lora_path="one")
    reply = await site.http.put("/v1/aliases/live", json={"adapter": "one"})
    assert checked(reply, 200)["aliases"] == ["live"]
    await site.post("/v1/unload_lora_adapter", lora_name="live")
    assert await site.models() == ["one"]
    await site.post("/v1/unload_lora_adapter", 400, lora_name="one@1")
    base = checked(await site.http.get("/v1/models"), 200)["data"][0]["id"]
    await site.post("/v1/unload_lora_adapter", 400, lora_name=base)
    assert await site.models() == ["one"]


async def test_a_model_is_deleted_by_its_id(site: Gateway) -> None:
    site.write("one")
    await site.post("/v1/load_lora_adapter", lora_name="org/one", lora_path="one")
    reply = await site.http.delete("/v1/models/org/one")
    assert checked(reply, 200) == {"id": "org/one", "object": "model", "deleted": True}
    reply = await site.http.delete("/v1/models/org/one")
    assert checked(reply, 404)["error"]["code"] == "model_not_found"


async def test_the_endpoints_of_sglang(site: Gateway) -> None:
    site.write("one")
    site.write("two", seed=1)
    done = await site.post("/load_lora_adapter", lora_name="one", lora_path="one", pinned=None)
    digest = (await site.adapter("one"))["digest"]
    assert done == {"success": True, "error_message": "", "loaded_adapters": {"one": digest}}
    for status, body in (
        (400, {"lora_name": "one", "lora_path": "two"}),
        (400, {"lora_name": "two", "lora_path": "none"}),
        (403, {"lora_name": "two", "lora_path": "/etc"}),
    ):
        refused = await site.post("/load_lora_adapter", status, **body)
        assert not refused["success"]
        assert refused["error_message"]
    done = await site.post("/unload_lora_adapter", lora_name="one")
    assert done["loaded_adapters"] == {}
    assert not (await site.post("/unload_lora_adapter", 400, lora_name="one"))["success"]


async def test_the_endpoints_of_aibrix_and_dynamo(site: Gateway) -> None:
    folder = site.write("one")
    await site.post(
        "/v1/lora_adapter/load",
        lora_name="one", artifact_url=str(folder), credentials={}, additional_config={"a": 1},
    )  # fmt: skip
    secret = {"lora_name": "two", "artifact_url": str(folder), "credentials": {"key": "s3cr3t"}}
    refused = await site.post("/v1/lora_adapter/load", 400, **secret)
    assert refused["param"] == "credentials"
    assert "s3cr3t" not in str(refused)
    await site.post("/v1/loras", lora_name="two", source={"uri": f"file://{folder}"})
    listed = checked(await site.http.get("/v1/loras"), 200)
    assert (listed["count"], sorted(listed["loras"])) == (2, ["one", "two"])
    done = await site.post("/v1/lora_adapter/unload", lora_name="one", cleanup_local=True)
    assert done["status"] == "success"
    assert checked(await site.http.delete("/v1/loras/two"), 200)["lora_name"] == "two"
    assert await site.models() == []


async def test_without_management_the_endpoints_do_not_exist(tmp_path: Path) -> None:
    async with gateway(tmp_path, {"manages_adapters": False}) as site:
        site.http.event_hooks = {}  # the specification is of a gateway that manages adapters
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter", "/v1/lora_adapter/load"):
            await site.post(path, 404, lora_name="x", lora_path="x")
        assert (await site.http.post("/v1/adapters", json={})).status_code == 405
        assert checked(await site.http.get("/v1/adapters"), 200)["data"] == []


def test_every_operation_about_adapters_is_specified_and_exists() -> None:
    context = Context(GatewaySettings())
    routes = {
        (method, re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path))
        for route in adapters.routes(context)
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    specified = {
        (method.upper(), path)
        for path, item in specification.document()["paths"].items()
        for method, found in item.items()
        if method != "parameters" and "adapters" in " ".join(found["tags"])
    }
    assert routes - specified == {("DELETE", "/v1/models/{model}")}
    assert specified <= routes


async def test_a_label_that_others_set_hides_no_adapter_of_that_id(site: Gateway) -> None:
    site.write("one")
    site.write("two", seed=1)
    await site.post("/v1/load_lora_adapter", lora_name="org/x", lora_path="one")
    await site.post("/v1/adapters", 201, name="a", source="two")
    await site.post("/v1/adapters/a/labels", set={"loraplex.dev/model-id": "org/x"})
    await site.post("/v1/unload_lora_adapter", lora_name="org/x")
    (left,) = checked(await site.http.get("/v1/adapters"), 200)["data"]
    assert left["name"] == "a"
