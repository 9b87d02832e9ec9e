"""Adapters as plain resources: what the console reads, uploads, checks and moves."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway.adapter_gateway import Gateway, checked, gateway
from loraplex import AdapterInfo, AsyncClient
from loraplex.v1 import adapter_pb2 as pb
from loraplex_gateway.adapters.reading import changes
from loraplex_gateway.wire import bodies
from rpc.harness import write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with gateway(tmp_path) as found:
        yield found


def form(folder: Path, *, by_role: bool = True) -> list[tuple[str, Any]]:
    """The two files of an adapter as parts of a form."""
    roles = (("config", CONFIG), ("weights", WEIGHTS))
    return [
        (role if by_role else "files", (f"deep/{name}", (folder / name).read_bytes()))
        for role, name in roles
    ]


async def send(site: Gateway, files: Any, status: int, **fields: str) -> Any:
    reply = await site.http.post("/v1/adapters", files=files, data=fields)
    return checked(reply, status)


async def uploads(site: Gateway) -> int:
    """Number of uploads that the server holds open."""
    return len((await site.up.adapters.ListUploads(pb.ListUploadsRequest())).uploads)


async def test_an_upload_registers_and_a_second_one_changes_nothing(
    site: Gateway, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "one")
    fields = {"name": "one", "labels": '{"team": "a"}', "load": "true", "eos_token_ids": "[5, 6]"}
    done = await send(site, form(folder), 201, **fields)
    assert done["object"] == "adapter.registration"
    assert (done["created"], done["adapter"]["id"]) == (True, "one@1")
    assert done["adapter"]["labels"] == {"team": "a"}
    assert done["adapter"]["eos_token_ids"] == [5, 6]
    assert done["adapter"]["state"] == "resident"
    again = await send(site, form(folder, by_role=False), 200, **fields)
    assert (again["created"], again["adapter"]["id"]) == (False, "one@1")
    other = write_adapter(tmp_path / "two", seed=1)
    refused = await send(site, form(other), 409, name="one")
    assert refused["error"]["code"] == "adapter_conflict"
    moved = await send(site, form(other), 201, name="one", replace="true")
    assert moved["adapter"]["version"] == 2
    assert await uploads(site) == 0


async def test_every_field_of_an_adapter_is_shown(site: Gateway, tmp_path: Path) -> None:
    await send(site, form(write_adapter(tmp_path / "one")), 201, name="Org/One")
    (found,) = checked(await site.http.get("/v1/adapters"), 200)["data"]
    fields = {each.name for each in dataclasses.fields(AdapterInfo)}
    assert found.keys() == fields | {"object", "id", "model"}
    assert (found["model"], found["object"]) == ("Org/One", "adapter")
    assert await site.adapter(found["name"]) == found
    assert await site.adapter(found["id"]) == found


async def test_a_check_reports_everything_and_registers_nothing(
    site: Gateway, tmp_path: Path
) -> None:
    good = await send(site, form(write_adapter(tmp_path / "a")), 200, validate_only="true")
    assert (good["object"], good["valid"], good["findings"]) == ("adapter.validation", True, [])
    assert good["spec"]["rank"] == 2
    bad = write_adapter(tmp_path / "b", target_modules=["nowhere"], r=3)
    report = await send(site, form(bad), 200, validate_only="true")
    assert (report["valid"], report["spec"]) == (False, None)
    assert {"reason", "field", "message"} == report["findings"][0].keys()
    noted = [*form(tmp_path / "a"), ("other", ("tokenizer.json", b"{}"))]
    assert (await send(site, noted, 200, validate_only="true"))["notes"]
    site.write("there")
    for source, is_valid in (("there", True), ("nowhere", None)):
        body = {"source": source, "validate_only": True}
        reply = await site.http.post("/v1/adapters", json=body)
        assert reply.status_code == (200 if is_valid else 400), reply.text
    assert await site.models() == []
    assert await uploads(site) == 0


async def test_a_form_that_is_no_adapter_is_refused_in_plain_words(
    site: Gateway, tmp_path: Path
) -> None:
    files = form(write_adapter(tmp_path / "one"))
    config, weights = files
    huge = ("config", (CONFIG, b" " * (1 << 20) + b"{}"))
    cases: list[tuple[Any, dict[str, str], int]] = [
        ([config], {"name": "x"}, 400),
        ([weights], {"name": "x"}, 400),
        ([config, config, weights], {"name": "x"}, 400),
        ([huge, weights], {"name": "x"}, 400),
        (files, {}, 400),
        (files, {"name": "x" * 300}, 400),
        (files, {"name": "x", "labels": "no JSON"}, 400),
        (files, {"name": "x", "labels": "[1]"}, 400),
        (files, {"name": "x", "labels": '{"UPPER": "x"}'}, 400),
        (files, {"name": "x", "eos_token_ids": "[-1]"}, 400),
        (files, {"name": "x", "load": "yes"}, 400),
        (files, {"name": "x", "unknown": "1"}, 400),
        ([*files, ("f", ("..", b"x"))], {"name": "x"}, 400),
        ([config, ("weights", (WEIGHTS, b""))], {"name": "x"}, 400),
        ([config, ("weights", (WEIGHTS, b"\x80\x04pickle" * 20))], {"name": "x"}, 400),
        ([("config", (CONFIG, b"{")), weights], {"name": "x"}, 400),
        ([*files, *((f"f{i}", (f"f{i}", b"")) for i in range(100))], {"name": "x"}, 400),
    ]
    for given, fields, status in cases:
        refused = await send(site, given, status, **fields)
        assert refused["error"]["message"], (fields, refused)
        assert "/tmp" not in refused["error"]["message"]
        assert str(tmp_path) not in refused["error"]["message"]
    for data in (b"", b"--x\r\nnonsense", b"--x--"):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        reply = await site.http.post("/v1/adapters", content=data, headers=headers)
        assert reply.status_code == 400, reply.text
    reply = await site.http.post(
        "/v1/adapters", content=b"x", headers={"content-type": "multipart/form-data"}
    )
    assert reply.status_code == 400
    assert await site.models() == []
    assert await uploads(site) == 0


async def test_an_upload_is_bounded_whether_it_says_its_length_or_not(tmp_path: Path) -> None:
    async with gateway(tmp_path, {"max_upload_bytes": 2000}) as site:
        files = form(write_adapter(tmp_path / "one", rank=8))
        assert (await send(site, files, 413, name="x"))["error"]["code"] == "request_too_large"
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            yield b'--x\r\ncontent-disposition: form-data; name="weights"; filename="w"\r\n\r\n'
            while True:
                sent += 1000
                yield b"x" * 1000

        headers = {"content-type": "multipart/form-data; boundary=x"}
        reply = await site.http.post("/v1/adapters", content=endless(), headers=headers)
        assert reply.status_code == 413
        assert sent < 10_000
        assert await uploads(site) == 0


async def test_a_sender_who_falls_silent_is_given_up(
    site: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "SILENT_SECONDS", 0.05)

    async def silent() -> AsyncIterator[bytes]:
        yield b"--x\r\n"
        await asyncio.Event().wait()

    headers = {"content-type": "multipart/form-data; boundary=x"}
    reply = await site.http.post("/v1/adapters", content=silent(), headers=headers)
    assert reply.status_code == 408
    assert await uploads(site) == 0


async def test_an_adapter_is_moved_to_the_device_and_back(site: Gateway) -> None:
    site.write("one")
    body = {"name": "one", "source": "one", "labels": {"team": "a"}}
    made = checked(await site.http.post("/v1/adapters", json=body), 201)
    assert made["adapter"]["state"] == "stored"
    assert made["adapter"]["labels"] == {"team": "a", "loraplex.dev/source": "one"}
    for action, field, value in (
        ("load", "state", "resident"),
        ("pin", "pinned", True),
        ("unpin", "pinned", False),
        ("unload", "state", "stored"),
        ("unload", "state", "stored"),
    ):
        assert (await site.post(f"/v1/adapters/one/{action}"))[field] == value
    await site.post("/v1/adapters/one/unload", force=True, drain_seconds=0)
    await site.post("/v1/adapters/one/unload", 400, drain_seconds=-1)
    await site.post("/v1/adapters/none/load", 404)
    await site.post("/v1/adapters/one/explode", 404)


async def test_orders_to_merge_reach_the_engine(site: Gateway) -> None:
    site.write("one")
    await site.post("/v1/adapters", 201, name="one", source="one")
    refused = await site.post("/v1/adapters/one/merge", 400)
    assert refused["error"]["code"] == "merge_unsupported"  # the oracle merges nothing
    assert (await site.post("/v1/adapters/one/unmerge"))["merged_bytes"] == 0


async def test_labels_aliases_and_names_are_changed(site: Gateway) -> None:
    http = site.http
    site.write("one")
    await site.post("/v1/adapters", 201, name="one", source="one")
    found = await site.post("/v1/adapters/one/labels", set={"a": "1", "b": "2"})
    found = await site.post("/v1/adapters/one/labels", set={"b": "3"}, remove=["a"])
    assert {k: v for k, v in found["labels"].items() if "/" not in k} == {"b": "3"}
    for query, count in (({"label": "b=3"}, 1), ({"label": ["b=3", "c=1"]}, 0), ({}, 1)):
        listed = checked(await http.get("/v1/adapters", params=query), 200)
        assert (listed["object"], len(listed["data"])) == ("list", count)
    assert (await http.get("/v1/adapters", params={"label": "b"})).status_code == 400
    set_alias = {"adapter": "one", "expected": ""}
    checked(await http.put("/v1/aliases/live", json=set_alias), 200)
    checked(await http.put("/v1/aliases/live", json=set_alias), 409)
    checked(await http.put("/v1/aliases/live", json={"adapter": "one", "expected": "one@1"}), 200)
    checked(await http.put("/v1/aliases/next", json={"adapter": "none"}), 404)
    listed = checked(await http.get("/v1/aliases"), 200)
    assert listed == {"object": "list", "data": [{"alias": "live", "adapter": "one@1"}]}
    gone = checked(await http.delete("/v1/aliases/live"), 200)
    assert gone == {"id": "live", "object": "alias", "deleted": True}
    checked(await http.delete("/v1/aliases/live"), 404)
    gone = checked(await http.delete("/v1/adapters/one"), 200)
    assert gone == {"id": "one", "object": "adapter", "deleted": True}
    checked(await http.get("/v1/adapters/one"), 404)
    assert (await site.post("/v1/adapters/one/restore"))["id"] == "one@1"


async def test_changes_are_sent_as_events_after_the_table(site: Gateway) -> None:
    site.write("one")
    async with AsyncClient(str(site.up.server.address)) as client:
        events = changes(client)
        first = await anext(events)
        await site.post("/v1/adapters", 201, name="one", source="one")
        second = await anext(events)
        await events.aclose()
    seen = []
    for data in (first, second):
        head, body = data.decode().strip().split("\n")
        seen.append((head.removeprefix("event: "), json.loads(body.removeprefix("data: "))))
    assert seen[0] == ("table", {"adapters": [], "aliases": {}, "resync": False})
    name, change = seen[1]
    assert (name, change["kind"], change["adapter"]["id"]) == ("change", "registered", "one@1")
