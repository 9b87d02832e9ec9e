"""The adapters of the fake gateway, and its paths about them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

Json = dict[str, Any]
Handler = Callable[[Request], Awaitable[Response]]
BASE = "smollm2-135m-instruct"


class Refused(Exception):
    """A call that the server refuses."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Adapters:
    """Versions of names, aliases, and who watches them."""

    def __init__(self) -> None:
        self.versions: dict[str, list[Json]] = {}
        self.deleted: dict[str, list[Json]] = {}
        self.watchers: set[asyncio.Queue[Json]] = set()
        self.reset()

    def reset(self) -> None:
        """Goes back to the adapters of the start."""
        self.versions.clear()
        self.deleted.clear()
        for name, rank, size in (
            ("json", 8, 921_600),
            ("pirate", 8, 1_843_200),
            ("terse", 16, 3_686_400),
        ):
            self.add(name, rank, size, {"team": "demo"})
        self.add("pirate", 8, 1_843_200, {"team": "demo"})
        self.move(self.versions["pirate"][0], "resident")
        self.versions["pirate"][1]["aliases"] = ["production"]

    def add(self, name: str, rank: int, size: int, labels: dict[str, str]) -> Json:
        """Registers a new version."""
        versions = self.versions.setdefault(name, [])
        number = len(versions) + 1
        adapter = {
            "object": "adapter",
            "id": f"{name}@{number}",
            "model": name,
            "name": name,
            "version": number,
            "digest": "sha256:" + hashlib.sha256(f"{name}{number}".encode()).hexdigest(),
            "peft_type": "LORA",
            "rank": rank,
            "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
            "size_bytes": size,
            "state": "stored",
            "tier": "disk",
            "device_bytes": 0,
            "host_bytes": 0,
            "merged_bytes": 0,
            "pinned": False,
            "active_requests": 0,
            "create_time": _now(),
            "last_use_time": None,
            "load_seconds": None,
            "base_name": BASE,
            "aliases": [],
            "labels": dict(labels),
            "provenance": {"trainer": "loraplex"},
            "unservable": None,
        }
        versions.insert(0, adapter)
        self.tell("registered", adapter)
        return adapter

    def find(self, text: str) -> Json:
        """The version that an id names."""
        name, _, number = text.partition("@")
        for adapter in self.versions.get(name, []):
            if not number or str(adapter["version"]) == number:
                return adapter
        for adapter in self.all():
            if text in adapter["aliases"]:
                return adapter
        raise Refused(404, f"The model `{text}` does not exist.", "model_not_found")

    def all(self) -> list[Json]:
        """Every version of every name."""
        return [adapter for name in sorted(self.versions) for adapter in self.versions[name]]

    def current(self) -> list[Json]:
        """The current versions."""
        return [self.versions[name][0] for name in sorted(self.versions)]

    def move(self, adapter: Json, state: str) -> None:
        """Puts an adapter onto the device, or takes it away."""
        resident = state == "resident"
        adapter["state"] = state
        adapter["tier"] = "device" if resident else "disk"
        adapter["device_bytes"] = 2 * adapter["size_bytes"] if resident else 0
        self.tell("resident" if resident else "evicted", adapter)

    def tell(self, kind: str, adapter: Json) -> None:
        """Sends an event to all watchers."""
        for watcher in self.watchers:
            watcher.put_nowait({"kind": kind, "adapter": adapter, "alias": ""})

    def cards(self) -> list[Json]:
        """What /v1/models lists."""
        base = {"id": BASE, "object": "model", "created": 0, "owned_by": "loraplex"}
        found: list[Json] = [{**base, "root": BASE, "parent": None, "max_model_len": 2048}]
        for adapter in self.current():
            found.append(
                {**found[0], "id": adapter["name"], "root": adapter["name"], "parent": BASE}
            )
        for adapter in self.all():
            for alias in adapter["aliases"]:
                found.append({**found[0], "id": alias, "root": adapter["name"], "parent": BASE})
        return found


def handlers(adapters: Adapters) -> list[tuple[str, str, Handler]]:
    """Methods, paths and handlers."""

    async def act(request: Request) -> Response:
        adapter = adapters.find(request.path_params["adapter"])
        action = request.path_params["action"]
        await asyncio.sleep(0.15)
        if action in ("load", "pin", "merge"):
            adapters.move(adapter, "resident")
        if action == "unload":
            adapter |= {"pinned": False, "merged_bytes": 0}
            adapters.move(adapter, "stored")
        if action in ("pin", "unpin"):
            adapter["pinned"] = action == "pin"
        if action in ("merge", "unmerge"):
            adapter["merged_bytes"] = 40_000_000 if action == "merge" else 0
        adapters.tell(action, adapter)
        return JSONResponse(adapter)

    async def restore(request: Request) -> Response:
        name = request.path_params["adapter"]
        if name not in adapters.deleted:
            raise Refused(404, f"{name} is not a deleted adapter", "adapter_not_found")
        adapters.versions[name] = adapters.deleted.pop(name)
        adapters.tell("registered", adapters.versions[name][0])
        return JSONResponse(adapters.versions[name][0])

    async def delete(request: Request) -> Response:
        adapter = adapters.find(request.path_params["adapter"])
        adapters.deleted[adapter["name"]] = adapters.versions.pop(adapter["name"])
        adapters.tell("deleted", adapter)
        return JSONResponse({"id": adapter["name"], "object": "adapter", "deleted": True})

    async def versions(request: Request) -> Response:
        name = request.path_params["adapter"]
        return JSONResponse({"object": "list", "data": adapters.versions.get(name, [])})

    async def label(request: Request) -> Response:
        adapter, change = adapters.find(request.path_params["adapter"]), await request.json()
        adapter["labels"] = {
            key: value
            for key, value in (adapter["labels"] | change.get("set", {})).items()
            if key not in change.get("remove", [])
        }
        adapters.tell("labelled", adapter)
        return JSONResponse(adapter)

    async def aliases(_: Request) -> Response:
        found = [{"alias": a, "adapter": v["id"]} for v in adapters.all() for a in v["aliases"]]
        return JSONResponse({"object": "list", "data": found})

    async def set_alias(request: Request) -> Response:
        alias, wanted = request.path_params["alias"], await request.json()
        holders = [version for version in adapters.all() if alias in version["aliases"]]
        if wanted.get("expected") not in (None, holders[0]["id"] if holders else ""):
            raise Refused(409, f"{alias} points to another version", "adapter_conflict")
        target = adapters.find(wanted["adapter"])
        for holder in holders:
            holder["aliases"].remove(alias)
        target["aliases"].append(alias)
        adapters.tell("alias_set", adapters.versions[target["name"]][0])
        return JSONResponse(target)

    async def register(request: Request) -> Response:
        form = await request.form()
        found = {name: await _text(value) for name, value in form.items() if name != "weights"}
        findings = _faults(found["config"])
        if found.get("validate_only") == "true":
            return JSONResponse(_report(found["config"], findings))
        if findings:
            raise Refused(400, findings[0]["message"], "adapter_invalid")
        name = found["name"]
        if name in adapters.versions and found.get("replace") != "true":
            raise Refused(
                409, f"{name} has other bytes; set replace to add a version", "adapter_conflict"
            )
        adapter = adapters.add(name, json.loads(found["config"])["r"], 921_600, {})
        if found.get("load") == "true":
            adapters.move(adapter, "resident")
        answer = {
            "object": "adapter.registration",
            "adapter": adapter,
            "created": True,
            "notes": [],
        }
        return JSONResponse(answer, 201)

    async def listed(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": adapters.current()})

    async def events(_: Request) -> Response:
        return StreamingResponse(_events(adapters), media_type="text/event-stream")

    one = "/v1/adapters/{adapter}"
    return [
        ("GET", "/v1/adapter_events", events),
        ("GET", "/v1/adapters", listed),
        ("POST", "/v1/adapters", register),
        ("GET", one + "/versions", versions),
        ("POST", one + "/labels", label),
        ("POST", one + "/restore", restore),
        ("POST", one + "/{action}", act),
        ("DELETE", one, delete),
        ("GET", "/v1/aliases", aliases),
        ("PUT", "/v1/aliases/{alias}", set_alias),
    ]


async def _events(adapters: Adapters) -> AsyncIterator[str]:
    queue: asyncio.Queue[Json] = asyncio.Queue()
    adapters.watchers.add(queue)
    try:
        table = {"adapters": adapters.current(), "aliases": {}, "resync": False}
        yield f"event: table\ndata: {json.dumps(table)}\n\n"
        while True:
            yield f"event: change\ndata: {json.dumps(await queue.get())}\n\n"
    finally:
        adapters.watchers.discard(queue)


async def _text(value: Any) -> str:
    return value if isinstance(value, str) else (await value.read()).decode()


def _faults(config: str) -> list[dict[str, str]]:
    try:
        found = json.loads(config)
    except ValueError:
        return [_fault("ADAPTER_INVALID", "adapter_config.json", "The file is not valid JSON.")]
    faults = []
    if found.get("peft_type") != "LORA":
        faults.append(
            _fault("ADAPTER_UNSUPPORTED", "peft_type", f"{found.get('peft_type')} is not served.")
        )
    if found.get("r", 0) > 64:
        faults.append(
            _fault("RANK_TOO_LARGE", "r", f"rank {found['r']} is above this server's limit of 64.")
        )
    return faults


def _fault(reason: str, field: str, message: str) -> dict[str, str]:
    return {"reason": reason, "field": field, "message": message}


def _report(config: str, findings: list[dict[str, str]]) -> Json:
    spec = None
    if not findings:
        read = json.loads(config)
        spec = {
            "digest": "sha256:" + "0" * 64, "peft_type": "LORA", "rank": read["r"],
            "target_modules": read["target_modules"], "size_bytes": 921_600,
            "device_bytes": 1_843_200, "virtual_tokens": 0, "base_model": BASE, "provenance": {},
        }  # fmt: skip
    return {
        "object": "adapter.validation", "valid": not findings, "findings": findings, "spec": spec,
        "notes": [],
    }  # fmt: skip


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat()
