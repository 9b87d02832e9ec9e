"""A gateway over real HTTP, in front of a server over the oracle whose trainer is a script."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import uvicorn
from gateway.specification import require_declared
from loraplex_gateway.app import build
from loraplex_gateway.settings import GatewaySettings
from rpc.training_jobs import Training, training

TESTS = str(Path(__file__).resolve().parents[1])
BASE = "base-of-tests"


@dataclass
class FineTuning:
    """A server that trains, and the gateway's address."""

    trains: Training
    url: str


@asynccontextmanager
async def serving_http(target: str, **settings: Any) -> AsyncIterator[str]:
    """A gateway in a thread of its own, with its own event loop; yields its URL."""
    app = build(GatewaySettings(target=target, served_names=(BASE,), **settings))
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join)
        bound.close()


@asynccontextmanager
async def fine_tuning(folder: Path, **more: Any) -> AsyncIterator[FineTuning]:
    """Both, started and in the end closed."""
    paths = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}):
        async with (
            training(folder, **more) as trains,
            serving_http(str(trains.up.server.address)) as url,
        ):
            yield FineTuning(trains, url)


def declared(**options: Any) -> httpx2.AsyncClient:
    """A client that fails at an answer that gateway/openapi.yaml does not declare."""
    return httpx2.AsyncClient(timeout=60, event_hooks={"response": [require_declared]}, **options)
