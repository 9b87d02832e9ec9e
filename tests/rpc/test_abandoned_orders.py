"""Orders about adapters that clients have given up do not reach the device any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from loraplex.v1 import adapter_pb2 as pb
from rpc.harness import ask, rest, running, streamed, until

ONE_SLOT = {"num_slots": 1, "step_seconds": 0.04, "num_blocks": 400}


@pytest.mark.fault("abandoned-orders")
async def test_loads_that_clients_gave_up_are_not_carried_out(tmp_path: Path) -> None:
    """A running request holds the only slot while the clients wait."""
    async with running(tmp_path, engine_options=ONE_SLOT) as up:
        names = [f"a{i}" for i in range(8)]
        for seed, name in enumerate(["busy", *names, "last"]):
            await up.register(name, seed)
        call = up.generation.GenerateStream(streamed(ask(new=900, adapter="busy")))
        await call.read()
        orders = [
            *(up.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id=name)) for name in names),
            *(up.adapters.PinAdapter(pb.PinAdapterRequest(adapter_id=name)) for name in names),
            *(up.adapters.MergeAdapter(pb.MergeAdapterRequest(adapter_id=name)) for name in names),
        ]
        engine = up.server.engine
        await until(lambda: len(engine._pending) == len(orders))
        last = up.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="last"))
        await until(lambda: len(engine._pending) == len(orders) + 1)
        for order in orders:
            order.cancel()
        outcomes = await asyncio.gather(*orders, return_exceptions=True)
        assert all(isinstance(o, asyncio.CancelledError | grpc.aio.AioRpcError) for o in outcomes)
        await until(lambda: len(engine._pending) == 1)
        call.cancel()
        await last
        # Loads are carried out in their order, so those given up would have come before the last.
        assert up.metric("adapter_loads_total", tier="disk", result="ok") == 2
        assert [status.state for status in engine.adapters.values()] == ["resident"]
        assert await rest(up.generation.GenerateStream(streamed(ask(new=2, adapter="last"))))
