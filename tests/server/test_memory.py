"""The memory of a serving process does not grow with the calls that were refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from loraplex.v1 import adapter_pb2, generation_pb2
from server.test_process import serving

MARGIN_MIB = 100
"""Growth that is allowed: less than the memory of one call of those below."""

ROUNDS = 8


def rss_mib(pid: int) -> int:
    """Resident memory of a process."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True)
    return int(shown.stdout) >> 10


def refused(channel: grpc.Channel, method: str, data: bytes) -> None:
    with pytest.raises(grpc.RpcError):
        channel.unary_unary(f"/loraplex.v1.{method}")(data)


def cancelled(channel: grpc.Channel, method: str, data: bytes) -> None:
    channel.unary_unary(f"/loraplex.v1.{method}").future(data).cancel()


@pytest.mark.slow
@pytest.mark.fault("refused-calls-keep-memory")
def test_large_calls_that_are_refused_or_cancelled_leave_nothing(tmp_path: Path) -> None:
    turns = [{"role": "user"}] * 500_000
    chat = generation_pb2.GenerateRequest(messages={"messages": turns}).SerializeToString()
    text = generation_pb2.GenerateRequest(prompt="x " * (1 << 20))
    labels = adapter_pb2.LabelAdapterRequest(adapter_id="a", remove=["a"] * 500_000)
    calls: list[tuple[Callable[[grpc.Channel, str, bytes], None], str, bytes]] = [
        (refused, "GenerationService/Generate", chat),
        (cancelled, "GenerationService/Generate", chat),
        (refused, "GenerationService/Generate", text.SerializeToString()),
        (refused, "AdapterService/LabelAdapter", labels.SerializeToString()),
        (refused, "GenerationService/Generate", b"\xff" * (1 << 20)),
    ]
    with serving(tmp_path) as up, grpc.insecure_channel(up.grpc) as channel:
        for call in calls:
            call[0](channel, *call[1:])
        before = rss_mib(up.process.pid)
        for _ in range(ROUNDS):
            for act, method, data in calls:
                act(channel, method, data)
        assert rss_mib(up.process.pid) < before + MARGIN_MIB
