"""Adapters that must not be served are refused by every call that uses them, and by no other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import generation_pb2
from loraplex_adapters.store import Store
from loraplex_server import name_cache
from rpc.harness import Refused, Running, ask, refusal, rest, running, streamed


@pytest.fixture(autouse=True)
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes made by another process are seen by the next call."""
    monkeypatch.setattr(name_cache, "FRESH_SECONDS", 0.0)


async def refused(call: Awaitable[Any]) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


def uses(up: Running, name: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every call that uses an adapter."""
    one = generation_pb2.AdapterWeight(adapter_id=name, weight=1.0)
    return {
        "generate": lambda: up.generation.Generate(ask(adapter=name)),
        "mix": lambda: up.generation.Generate(ask(mix=[one])),
        "stream": lambda: rest(up.generation.GenerateStream(streamed(ask(adapter=name)))),
        "load": lambda: up.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id=name)),
        "pin": lambda: up.adapters.PinAdapter(pb.PinAdapterRequest(adapter_id=name)),
        "merge": lambda: up.adapters.MergeAdapter(pb.MergeAdapterRequest(adapter_id=name)),
    }


async def served(up: Running, name: str) -> None:
    """Makes the calls that use an adapter; the oracle's adapters cannot be merged."""
    calls = uses(up, name)
    del calls["merge"]
    for call in calls.values():
        await call()


async def manages(up: Running, name: str) -> None:
    """Calls that an operator needs for an adapter that is not served."""
    await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=name))
    await up.adapters.UnpinAdapter(pb.UnpinAdapterRequest(adapter_id=name))
    await up.adapters.UnmergeAdapter(pb.UnmergeAdapterRequest(adapter_id=name))
    await up.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id=name))
    await up.adapters.LabelAdapter(pb.LabelAdapterRequest(adapter_id=name, set={"a": "b"}))
    await up.adapters.SetAlias(pb.SetAliasRequest(alias=f"{name}-alias", adapter_id=name))


@pytest.mark.fault("adapter-kills-engines")
async def test_a_quarantined_adapter_is_refused_until_it_is_released(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        held = await up.register("held", 1, load=True)
        await up.register("sound", 2)
        with Store(tmp_path / "store") as store:
            store.quarantine(held.digest, "it ended the engine 3 times")
        for name, call in uses(up, "held").items():
            seen = await refused(call())
            assert seen.reason == "ADAPTER_QUARANTINED", name
            assert "held@1 is quarantined" in seen.message
            assert "it ended the engine 3 times" in seen.message
        await served(up, "sound")
        await manages(up, "held")
        assert (await refused(uses(up, "held-alias")["generate"]())).reason == "ADAPTER_QUARANTINED"
        for replace in (False, True):  # the same bytes, under another name
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await up.register("again", 1, load=True, replace=replace)
            assert refusal(caught.value).reason == "ADAPTER_QUARANTINED"
        with Store(tmp_path / "store") as store:
            store.release(held.digest)
        await served(up, "held")
