"""While files are examined, however long that takes, everything else is answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import generation_pb2
from loraplex_adapters.store import Store
from loraplex_server.registry import registry
from loraplex_server.text.tokenizer import INLINE_CHARACTERS
from rpc.harness import Running, ask, expected, refusal, running, until, write_adapter

pytestmark = pytest.mark.fault("validation-starves-calls")

T = TypeVar("T")

LONG = "the quick brown fox jumps over the lazy dog and stops at the end " * 40
PROMPT = [20, 21, 22]


async def soon(call: Awaitable[T]) -> T:
    """A generous bound: without lanes these calls waited for the examinations to end."""
    return await asyncio.wait_for(call, 20)


async def answered_meanwhile(up: Running, alpha: pb.Adapter) -> None:
    """Makes every call that needs a thread, but for none of the work that is held."""
    assert len(LONG) > INLINE_CHARACTERS
    for adapter_id in ("alpha", "alpha@1", f"alpha@{alpha.digest}"):
        reply = await soon(up.generation.Generate(ask(new=3, adapter=adapter_id)))
        assert list(reply.token_ids) == expected(PROMPT, 3, alpha.digest)
    text = generation_pb2.GenerateRequest(prompt=LONG, stop={"max_new_tokens": 2})
    assert (await soon(up.generation.Generate(text))).usage.completion_tokens == 2
    await soon(up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="alpha")))
    assert (await soon(up.adapters.ListAdapters(pb.ListAdaptersRequest()))).adapters
    await soon(up.adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(name="alpha")))
    await soon(up.adapters.LabelAdapter(pb.LabelAdapterRequest(adapter_id="alpha", remove=["x"])))
    await soon(up.adapters.SetAlias(pb.SetAliasRequest(alias="live", adapter_id="alpha")))
    assert (await soon(up.generation.Generate(ask(new=1, adapter="live")))).token_ids
    upload = await soon(up.adapters.StartUpload(pb.StartUploadRequest()))
    await soon(up.adapters.AbortUpload(pb.AbortUploadRequest(upload_id=upload.upload_id)))
    health = health_pb2_grpc.HealthStub(up.channel)
    await soon(health.Check(health_pb2.HealthCheckRequest()))


class Held:
    """Replaces a function by one that waits for the test first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.begun = 0
        self.end = threading.Event()
        original = getattr(owner, name)

        def work(*args: Any, **kwargs: Any) -> Any:
            self.begun += 1
            assert self.end.wait(60)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, work)


async def test_64_validations_hold_up_no_other_call_and_more_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_blocks": 1024}
    async with running(tmp_path, engine_options=options) as up:
        alpha = await up.register("alpha", load=True)
        held = Held(monkeypatch, registry, "examine")
        request = pb.ValidateAdapterRequest(path="alpha-0")
        calls = [asyncio.ensure_future(up.adapters.ValidateAdapter(request)) for _ in range(80)]
        await until(lambda: held.begun > 0 and any(call.done() for call in calls))
        await answered_meanwhile(up, alpha)
        assert (await soon(up.register("beta", 1))).version == 1
        refused = [call for call in calls if call.done()]
        for call in refused:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert refusal(caught.value).reason == "OVERLOADED"
        held.end.set()
        replies = await asyncio.gather(*(call for call in calls if call not in refused))
        assert len(replies) >= 64
        assert all(reply.HasField("spec") for reply in replies)


async def test_registrations_that_take_long_hold_up_no_other_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, engine_options={"num_blocks": 1024}) as up:
        alpha = await up.register("alpha", load=True)
        held = Held(monkeypatch, Store, "register")
        write_adapter(tmp_path / "import" / "beta", 1)
        calls = [
            up.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name=f"beta-{i}", path="beta"))
            for i in range(30)
        ]
        await until(lambda: held.begun > 0)
        await answered_meanwhile(up, alpha)
        validation = up.adapters.ValidateAdapter(pb.ValidateAdapterRequest(path="alpha-0"))
        assert (await soon(validation)).HasField("spec")
        held.end.set()
        assert all([(await soon(call)).created for call in calls])
