"""A gateway in this process in front of a whole server over the oracle, and requests to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from gateway.specification import require_declared
from loraplex_gateway.app import build
from loraplex_gateway.settings import GatewaySettings
from rpc.harness import Running, running, write_adapter


@dataclass
class Gateway:
    """A gateway, its server, and the folder below which it accepts paths."""

    http: httpx2.AsyncClient
    up: Running
    root: Path

    async def post(self, path: str, status: int = 200, **body: Any) -> Any:
        """The JSON, or else the text, that a POST is answered with."""
        return checked(await self.http.post(path, json=body), status)

    async def models(self) -> list[str]:
        """The ids that `/v1/models` lists, without the base's."""
        listed = checked(await self.http.get("/v1/models"), 200)
        return [card["id"] for card in listed["data"][1:]]

    async def adapter(self, name: str) -> Any:
        """An adapter as the gateway describes it."""
        return checked(await self.http.get(f"/v1/adapters/{name}"), 200)

    def write(self, name: str, seed: int = 0, **config: Any) -> Path:
        """An adapter below the gateway's folder."""
        return write_adapter(self.root / name, seed, **config)


def checked(reply: httpx2.Response, status: int) -> Any:
    """The content of a reply that must have this status."""
    assert reply.status_code == status, reply.text
    is_json = reply.headers.get("content-type", "").startswith("application/json")
    return reply.json() if is_json else reply.text


@asynccontextmanager
async def gateway(
    folder: Path, settings: dict[str, Any] | None = None, **server: Any
) -> AsyncIterator[Gateway]:
    """A gateway; `settings` are its own, the others those of the server."""
    root = folder / "shared"
    root.mkdir(parents=True, exist_ok=True)
    async with running(folder, **server) as up, http_to(up, root, settings) as http:
        yield Gateway(http, up, root)


@asynccontextmanager
async def http_to(
    up: Running, root: Path, settings: dict[str, Any] | None = None, key: str = ""
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway in front of a server that runs."""
    given = {"target": str(up.server.address), "adapter_root": root, **(settings or {})}
    app = build(GatewaySettings(**given))
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=transport,
            base_url="http://127.0.0.1",
            headers=headers,
            timeout=60,
            event_hooks={"response": [require_declared]},
        ) as http,
    ):
        yield http
