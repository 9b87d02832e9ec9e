"""Callers for tests: a directory of principals without files, and servers that use it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex.v1 import adapter_pb2 as pb
from loraplex_adapters.store import LabelSelector
from loraplex_server.access.identity import refused
from loraplex_server.access.identity.credentials import Credentials
from loraplex_server.access.identity.refused import BadCredential
from loraplex_server.access.principals import Principal
from loraplex_server.access.roles import ALL_ROLES, Role
from rpc.harness import Running, running, write_adapter

OPS = "ops"
"""Principal with every role."""


def principal(name: str, roles: Iterable[Role] = ALL_ROLES, adapters: str = "") -> Principal:
    """A principal that sees the adapters with these labels, by default all."""
    selector = LabelSelector.parse(adapters) if adapters else LabelSelector()
    return Principal(name, frozenset(roles), selector, imports="", cache_group=name)


class Callers:
    """Principals whose credential is their name after "Bearer "; tests change them as they like."""

    def __init__(self, *known: Principal) -> None:
        self.known = {each.name: each for each in known}
        self.asked = 0

    def identify(self, credentials: Credentials) -> Principal:
        self.asked += 1
        if not credentials.authorization:
            raise refused.missing()
        name = credentials.authorization.removeprefix("Bearer ")
        if name not in self.known:
            raise refused.invalid() from BadCredential("a name that is unknown")
        return self.known[name]

    async def watch(self, series: object) -> None:
        await asyncio.Event().wait()


def key(name: str) -> tuple[tuple[str, str], ...]:
    """The metadata with the credential of a principal."""
    return (("authorization", f"Bearer {name}"),)


@asynccontextmanager
async def guarded(
    folder: Path, patch: pytest.MonkeyPatch, callers: Callers, **settings: Any
) -> AsyncIterator[Running]:
    """A server that asks `callers` who calls, and writes its audit log to `audit.jsonl`."""
    patch.setattr("loraplex_server.runtime.parts.open_directory", lambda config: callers)
    settings = {"audit_log": folder / "audit.jsonl", **settings}
    async with running(folder, **settings) as up:
        yield up


async def code_of(call: Any) -> grpc.StatusCode:
    """The code with which a call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def audited(file: Path) -> list[Mapping[str, Any]]:
    """The lines of an audit log."""
    return [json.loads(line) for line in file.read_text("ascii").splitlines()]


async def register(up: Running, who: str, name: str, seed: int = 0, **request: Any) -> pb.Adapter:
    """Registers an adapter made for the purpose, as a principal."""
    folder = f"{name}-{seed}"
    write_adapter(up.folder / "import" / folder, seed)
    reply = await up.adapters.RegisterAdapter(
        pb.RegisterAdapterRequest(name=name, path=folder, **request), metadata=key(who)
    )
    return reply.adapter
