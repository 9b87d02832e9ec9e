"""Over every path, what a tenant must not see is answered as what does not exist, byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from gateway.adapter_gateway import gateway, http_to
from loraplex_server.access.identity.key_file import KeyFile
from rpc.harness import write_adapter
from rpc.training_jobs import lines, settings

from gateway import specification

pytestmark = pytest.mark.asyncio(loop_scope="module")

TESTS = str(Path(__file__).resolve().parents[1])
PRINCIPALS = """
[principals.owner]
roles = ["infer", "read", "register", "train"]
adapters = "team=owner"
name_prefix = "owner-"

[principals.tenant]
roles = ["infer", "read", "register", "admin", "train"]
adapters = "team=tenant"
name_prefix = "tenant-"

[principals.caller]
roles = ["infer"]
adapters = "team=tenant"
"""
TALK = [{"role": "user", "content": "hi"}]


@dataclass
class Shop:
    """The clients of the principals, and what the owner has: an id of each kind of thing."""

    callers: dict[str, httpx2.AsyncClient]
    hidden: dict[str, str]


@asynccontextmanager
async def shop_in(folder: Path) -> AsyncIterator[Shop]:
    (folder / "principals.toml").write_text(PRINCIPALS)
    names = ("owner", "tenant", "caller")
    keys = {name: KeyFile(folder / "keys.json").add(name)[1] for name in names}
    (folder / "import").mkdir()
    server = {
        "principals": folder / "principals.toml",
        "keys": folder / "keys.json",
        **settings(folder),
    }
    async with gateway(folder, {"served_names": ("base",)}, **server) as found:
        up, root = found.up, found.root
        of = {"served_names": ("base",)}
        async with (
            http_to(up, root, of, keys["owner"]) as owner,
            http_to(up, root, of, keys["tenant"]) as tenant,
            http_to(up, root, of, keys["caller"]) as caller,
        ):
            callers = {"owner": owner, "tenant": tenant, "caller": caller}
            yield Shop(callers, await _fill(owner, root))


async def _fill(owner: httpx2.AsyncClient, root: Path) -> dict[str, str]:
    """Makes one of everything that an owner can have."""
    write_adapter(root / "one")
    write_adapter(root / "two", seed=1)
    for name, path in (("owner-one", "one"), ("owner-org/Two@main", "two")):
        body = {"lora_name": name, "lora_path": path}
        assert (await owner.post("/v1/load_lora_adapter", json=body)).status_code == 200
    assert (await owner.put("/v1/aliases/owner-alias", json={"adapter": "owner-one"})).is_success
    form = {"purpose": (None, "fine-tune"), "file": ("secret.jsonl", lines("hold"))}
    file = (await owner.post("/v1/files", files=form)).json()["id"]
    job = (
        await owner.post(
            "/v1/fine_tuning/jobs",
            json={"model": "base", "training_file": file, "suffix": "owner-job"},
        )
    ).json()
    assert job["status"] in ("queued", "running"), job
    return {
        "name": "owner-one",
        "version": "owner-one@1",
        "alias": "owner-alias",
        "foreign": "owner-org/Two@main",
        "nested": "base:owner-one",
        "file": file,
        "job": job["id"],
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
        async with shop_in(tmp_path_factory.mktemp("shop")) as found:
            yield found


MISSING = {
    "name": "owner-zzz", "version": "owner-zzz@1", "alias": "owner-zzzzz",
    "foreign": "owner-zzz/Two@main", "nested": "base:owner-zzz",
    "file": "file-000000000001-0123abcd", "job": "ftjob-000000000001-0123abcd",
}  # fmt: skip
"""Ids of the same form that nothing has."""

ADAPTERS = ("name", "version", "alias", "foreign", "nested")
ANSWERS = {
    "/v1/chat/completions": {"messages": TALK},
    "/v1/chat/completions/render": {"messages": TALK},
    "/v1/completions": {"prompt": "the"},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "the"},
    "/detokenize": {"tokens": [5]},
}
"""Paths that take a model in their body, and the rest of it."""

UNLOADS = ("/v1/unload_lora_adapter", "/unload_lora_adapter", "/v1/lora_adapter/unload")
BY_PATH = {
    "model": ("/v1/models/{model}", "/v1/loras/{model}"),
    "adapter": (
        "/v1/adapters/{adapter}",
        *(
            f"/v1/adapters/{{adapter}}/{action}"
            for action in (
                "versions", "restore", "labels", "load", "unload", "pin", "unpin", "merge",
                "unmerge",
            )
        ),
    ),
    "alias": ("/v1/aliases/{alias}",),
    "file": ("/v1/files/{file}", "/v1/files/{file}/content"),
    "job": (
        "/v1/fine_tuning/jobs/{job}",
        *(
            f"/v1/fine_tuning/jobs/{{job}}/{rest}"
            for rest in ("cancel", "pause", "resume", "events", "checkpoints")
        ),
    ),
}  # fmt: skip
"""Paths with an id, by what the id is called there."""

WITHOUT = {
    "/v1/models", "/tokenizer_info", "/health", "/ping", "/version", "/metrics", "/v1/files",
    "/v1/fine_tuning/jobs", "/v1/adapters", "/v1/adapter_events", "/v1/aliases",
    "/v1/load_lora_adapter", "/load_lora_adapter", "/v1/lora_adapter/load", "/v1/loras",
    "/v1/engine/watch",
}  # fmt: skip
"""Paths that take no id of what exists; what they list is looked at below."""

BODIES: dict[str, Any] = {
    "/v1/adapters/{adapter}/labels": {"set": {"team": "tenant"}, "remove": []},
    "/v1/adapters/{adapter}/unload": {},
    "/v1/aliases/{alias}": {"adapter": "owner-one"},
}


async def test_every_path_is_looked_at() -> None:
    covered = {path for paths in BY_PATH.values() for path in paths} | WITHOUT
    covered |= ANSWERS.keys() | set(UNLOADS)
    assert covered == specification.document()["paths"].keys()


def seen(answer: httpx2.Response, id_: str) -> tuple[int, dict[str, str], str]:
    """An answer without the id that was asked for and what differs between any two requests."""
    changing = {"date", "content-length", "x-request-id"}
    headers = {k: v for k, v in answer.headers.items() if k.lower() not in changing}
    text = answer.text
    for shown in (json.dumps(id_)[1:-1], id_, id_.removeprefix("base:"), id_.partition("@")[0]):
        text = text.replace(shown, "ID")
    return answer.status_code, headers, text.replace("ID@1", "ID")


async def ask(
    http: httpx2.AsyncClient, method: str, path: str, body: Any = None
) -> httpx2.Response:
    sent = {"json": body} if body is not None else {}
    return await http.request(method, path, **sent)


async def same(
    shop: Shop, caller: str, kind: str, method: str, path: str, body: Any = None, field: str = ""
) -> None:
    """Asks for what is hidden and for what does not exist; the answers must be the same."""
    http, answers = shop.callers[caller], []
    for ids in (shop.hidden, MISSING):
        given = {**body, field: ids[kind]} if field else body
        found = await ask(http, method, path.format(id=ids[kind].replace("/", "%2F")), given)
        assert found.status_code >= 400 or "tokenize" in path, (path, found.text)
        answers.append(seen(found, ids[kind]))
    assert answers[0] == answers[1], (caller, method, path)


@pytest.mark.parametrize("caller", ["tenant", "caller"])
@pytest.mark.parametrize("kind", ADAPTERS)
async def test_an_adapter_of_another_is_answered_as_a_missing_one(
    shop: Shop, caller: str, kind: str
) -> None:
    for path, body in ANSWERS.items():
        await same(shop, caller, kind, "POST", path, body, "model")
        if "stream" in specification.document()["paths"][path]["post"].get("summary", ""):
            await same(shop, caller, kind, "POST", path, {**body, "stream": True}, "model")
    for path in UNLOADS:
        await same(shop, caller, kind, "POST", path, {}, "lora_name")
    for mix in ([shop.hidden[kind]], [MISSING[kind]]):
        terms = {"loraplex": {"mix": [{"adapter": name} for name in mix]}}
        answer = await ask(
            shop.callers[caller],
            "POST",
            "/v1/chat/completions",
            {"model": "base", "messages": TALK, **terms},
        )
        assert answer.status_code == 404, answer.text


@pytest.mark.parametrize("caller", ["tenant", "caller"])
@pytest.mark.parametrize("what", BY_PATH)
async def test_an_id_in_a_path_tells_nothing_of_others(shop: Shop, caller: str, what: str) -> None:
    kinds = {"model": ADAPTERS, "adapter": ("name", "version", "alias")}.get(what, (what,))
    for path in BY_PATH[what]:
        for method in specification.document()["paths"][path]:
            if method == "parameters":
                continue
            for kind in kinds:
                place = path.replace(f"{{{what}}}", "{id}")
                await same(shop, caller, kind, method.upper(), place, BODIES.get(path))


@pytest.mark.parametrize("caller", ["tenant", "caller"])
async def test_lists_and_orders_name_nothing_of_others(shop: Shop, caller: str) -> None:
    http = shop.callers[caller]
    secrets = [shop.hidden["file"], shop.hidden["job"], "owner", "secret.jsonl"]
    for path in sorted(WITHOUT - {"/metrics", "/v1/engine/watch", "/v1/adapter_events"}):
        if "get" in specification.document()["paths"][path]:
            answer = await http.get(path)
            assert not [each for each in secrets if each in answer.text], path
    for field in ("training_file", "validation_file"):
        answers = []
        for file in (shop.hidden["file"], MISSING["file"]):
            body = {"model": "base", "training_file": file, field: file, "suffix": "tenant-x"}
            answers.append(seen(await http.post("/v1/fine_tuning/jobs", json=body), file))
        assert answers[0] == answers[1]
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        kind = "file" if path == "/v1/files" else "job"
        answers = [await http.get(f"{path}?after={ids[kind]}") for ids in (shop.hidden, MISSING)]
        assert answers[0].json() == answers[1].json()


async def test_the_owner_still_has_everything(shop: Shop) -> None:
    """Nothing above has changed anything, so the answers were not the same for that reason."""
    http = shop.callers["owner"]
    listed = {card["id"] for card in (await http.get("/v1/models")).json()["data"]}
    assert {"owner-one", "owner-alias", "owner-org/Two@main"} <= listed
    assert (await http.get(f"/v1/files/{shop.hidden['file']}/content")).content == lines("hold")
    job = (await http.get(f"/v1/fine_tuning/jobs/{shop.hidden['job']}")).json()
    assert job["status"] in ("queued", "running")
    await http.post(f"/v1/fine_tuning/jobs/{shop.hidden['job']}/cancel")
