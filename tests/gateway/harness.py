"""A gateway over HTTP in this process, and what its answers must hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from loraplex.requests import GenerateOptions
from loraplex_gateway import serving
from loraplex_gateway.app import build
from loraplex_gateway.settings import GatewaySettings
from rpc.harness import Running, running

from gateway import specification

BASE = "oracle"
"""Name of the oracle's base model in the gateway of these tests."""


@dataclass
class Web:
    """A gateway that answers over HTTP.

    Attributes:
        url: its address, without a path.
        http: a client of it. Each of its answers is compared with the specification.
        app: the application.
    """

    url: str
    http: httpx.AsyncClient
    app: Any

    async def post(self, path: str, body: Any, key: str = "", **headers: str) -> httpx.Response:
        """Sends a body as JSON."""
        sent = {**headers, **({"authorization": f"Bearer {key}"} if key else {})}
        return await self.http.post(path, json=body, headers=sent)

    async def get(self, path: str, key: str = "") -> httpx.Response:
        """Asks for a path."""
        return await self.http.get(path, headers={"authorization": f"Bearer {key}"} if key else {})

    async def ok(self, path: str, body: Any, **given: Any) -> Any:
        """The JSON answer to a request that must succeed."""
        answer = await self.post(path, body, **given)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, path: str, body: Any, status: int, **given: Any) -> Mapping[str, Any]:
        """The error of a request that must fail with this status."""
        answer = await self.post(path, body, **given)
        assert answer.status_code == status, answer.text
        return error_of(answer)

    def app_metric(self, name: str, **labels: str) -> float:
        """The value of one of the gateway's own series."""
        metrics = self.app.user_middleware[0].kwargs["metrics"]
        return metrics.registry.get_sample_value(name, labels) or 0.0

    async def events(self, path: str, body: Any, **given: Any) -> list[Any]:
        """All events of a stream, which must end well; without the last one, [DONE]."""
        answer = await self.post(path, {**body, "stream": True}, **given)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events_of(answer.text)


def error_of(answer: httpx.Response) -> Mapping[str, Any]:
    """The error in a response, whose shape is that of OpenAI."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def events_of(text: str) -> list[Any]:
    """The events in a whole body of a stream."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert text.endswith("\n\n")
    assert all(block.startswith("data: ") for block in blocks), text
    data = [block.removeprefix("data: ") for block in blocks]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def needs_option(name: str) -> None:
    """Skips a test while the client of the server lacks an option."""
    if name not in GenerateOptions.__annotations__:
        pytest.skip(f"the client has no option {name}")


@asynccontextmanager
async def web(target: str, compared: bool = True, **settings: Any) -> AsyncIterator[Web]:
    """A gateway in front of the server at `target`.

    Its answers are `compared` with the specification, unless a server answers that is none.
    """
    given = GatewaySettings(**{"port": 0, "target": target, "served_names": (BASE,), **settings})
    app = build(given)
    listening = serving.listen(given)
    server = serving.server_of(app, given)
    serving_task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:  # noqa: ASYNC110 - the server sets no event
        await asyncio.sleep(0.005)
    url = f"http://{serving.address(*listening.getsockname()[:2])}"
    try:
        hooks = {"response": [specification.require_declared] if compared else []}
        async with httpx.AsyncClient(
            base_url=url, event_hooks=hooks, timeout=60, trust_env=False
        ) as http:
            yield Web(url, http, app)
    finally:
        server.should_exit = True
        await serving_task


@asynccontextmanager
async def gateway(folder: Path, **settings: Any) -> AsyncIterator[tuple[Running, Web]]:
    """A server over the oracle and a gateway; settings that begin with `web_` are the gateway's."""
    of_web = {k.removeprefix("web_"): v for k, v in settings.items() if k.startswith("web_")}
    of_server = {k: v for k, v in settings.items() if not k.startswith("web_")}
    async with running(folder, **of_server) as up, web(str(up.server.address), **of_web) as seen:
        yield up, seen
