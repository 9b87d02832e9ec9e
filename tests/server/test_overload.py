"""Health, the adapter calls and resident adapters go on answering, whatever others call meanwhile.

Each overload is a stream of calls that any client may make. They run against a server process of
their own, from this process, while a bystander makes ordinary calls one after the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    training_pb2,
)
from rpc.harness import HARMLESS, WIDTH, ask, write_adapter
from rpc.raw_http2 import DEFAULT_WINDOW, raw_connection
from safetensors.numpy import save_file
from server.test_process import TESTS, write_config

pytestmark = pytest.mark.fault("overload-unmeasured")

LIMITS = {"Check": 2.0, "GetAdapter": 2.0, "ListAdapters": 2.0, "Generate": 5.0}
"""Generous bounds, in seconds, on the bystander's calls. Two cores may be shared with other work,
and a generation shares the engine's steps with what others generate."""

HIGH_PRIORITY = 10
HEAD_START_SECONDS = 10.0
"""Bound on a generation while others use `HIGH_PRIORITY`, which is a head start of 2 s."""

ROUNDS = 4
"""Calls of each kind that the bystander makes during an overload."""

LARGE_VOCABULARY = {"vocab_size": 49_152, **HARMLESS}
ENGINE = {
    "num_blocks": 8192,
    "max_context": 16_384,
    "adapter_budget_bytes": 2500,
    "step_seconds": 0.002,
}
MESSAGE_BYTES = 4_000_000


@dataclass
class Beset:
    """A server process, the overload's channel to it, and what the bystander saw."""

    address: str
    folder: Path
    channel: grpc.aio.Channel
    sent: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def adapters(self) -> adapter_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    async def repeat(self, call: Callable[[], Awaitable[Any]], pause: float) -> None:
        """Repeats a call, which may fail in any way."""
        while True:
            self.sent += 1
            try:
                await call()
            except grpc.RpcError as error:
                self.codes[error.code().name] += 1
            else:
                self.codes["OK"] += 1
            await asyncio.sleep(pause)

    async def send(self, method: str, data: bytes) -> Any:
        """Makes a call with these bytes, which cost this process nothing to make."""
        return await self.channel.unary_unary(f"/loraplex.v1.{method}")(data)


def separate() -> list[tuple[str, Any]]:
    """Options of a channel with a connection of its own."""
    return [("grpc.use_local_subchannel_pool", 1)]


@asynccontextmanager
async def beset(folder: Path, **engine: Any) -> AsyncIterator[Beset]:
    for seed in range(9):
        write_adapter(folder / "import" / f"adapter-{seed}", seed)
    file = write_config(folder, engine_options={**ENGINE, **engine}, max_waiting_tokens=1 << 20)
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    log = (folder / "log").open("wb")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loraplex_server.cli", "serve", "--config", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        ready = (await process.stdout.readline()).split()
        assert ready, (folder / "log").read_text()
        address = ready[2].decode()
        async with grpc.aio.insecure_channel(address, options=separate()) as channel:
            up = Beset(address, folder, channel)
            for seed in range(9):
                await up.adapters.RegisterAdapter(
                    adapter_pb2.RegisterAdapterRequest(
                        name=f"adapter-{seed}", path=f"adapter-{seed}"
                    )
                )
            pin = adapter_pb2.PinAdapterRequest(adapter_id="adapter-0")
            await up.adapters.PinAdapter(pin)
            yield up
    finally:
        process.kill()
        await process.wait()
        log.close()
        for line in (folder / "log").read_text(errors="replace").splitlines():
            if " INFO " not in line:  # pytest shows it if the test fails
                print(line[:1000])


async def observe(up: Beset, generations: int) -> None:
    """Makes the bystander's calls; raises if one fails or is late."""
    async with grpc.aio.insecure_channel(up.address, options=separate()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        generation = generation_pb2_grpc.GenerationServiceStub(channel)
        known = adapter_pb2.GetAdapterRequest(adapter_id="adapter-0")
        calls = {
            "Check": lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=20),
            "GetAdapter": lambda: adapters.GetAdapter(known, timeout=20),
            "ListAdapters": lambda: adapters.ListAdapters(
                adapter_pb2.ListAdaptersRequest(), timeout=20
            ),
            "Generate": lambda: generation.Generate(ask(new=4, adapter="adapter-0"), timeout=20),
        }
        for name, call in calls.items():
            for _ in range(generations if name == "Generate" else ROUNDS):
                began = time.monotonic()
                await call()
                up.seconds.setdefault(name, []).append(time.monotonic() - began)
                await asyncio.sleep(0.05)


# the overloads: each returns the calls that are repeated at once


Calls = Iterator[Callable[[], Awaitable[Any]]]


def big_messages(up: Beset) -> Calls:
    """Messages of 4 MB: empty turns, label keys, states of jobs."""
    chat = generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name["messages"]
    turn = _bytes(chat.message_type.fields_by_name["messages"].number, b"")
    remove = adapter_pb2.LabelAdapterRequest.DESCRIPTOR.fields_by_name["remove"].number
    states = training_pb2.ListJobsRequest.DESCRIPTOR.fields_by_name["states"].number
    for method, data in (
        ("GenerationService/Generate", _bytes(chat.number, turn * (MESSAGE_BYTES // len(turn)))),
        ("AdapterService/LabelAdapter", _bytes(remove, b"a") * (MESSAGE_BYTES // 3)),
        ("TrainingService/ListJobs", _bytes(states, b"\x01" * MESSAGE_BYTES)),
    ):
        yield lambda method=method, data=data: up.send(method, data)  # type: ignore[misc]


def validations(up: Beset) -> Calls:
    """64 validations at once of an adapter in which thousands of tensors are wrong."""
    folder = write_adapter(up.folder / "import" / "large")
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": np.zeros(
            (2, WIDTH), np.float32
        )
        for i in range(7000)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    request = adapter_pb2.ValidateAdapterRequest(path="large")
    for _ in range(64):
        yield lambda: up.adapters.ValidateAdapter(request)


def abandoned_loads(up: Beset) -> Calls:
    """Loads of more adapters than there is room for, given up after a few milliseconds."""
    for number in range(256):
        request = adapter_pb2.LoadAdapterRequest(adapter_id=f"adapter-{1 + number % 8}")
        yield lambda request=request: up.adapters.LoadAdapter(  # type: ignore[misc]
            request, timeout=0.005
        )


def costly_sampling(up: Beset) -> Calls:
    """Every sampling parameter at its most expensive, for every row of the batch."""
    sampling = {
        "temperature": 100.0,
        "top_p": 0.999,
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "frequency_penalty": 1.0,
    }
    for _ in range(48):
        yield lambda: up.generation.Generate(ask(new=64, sampling=sampling))


def high_priority(up: Beset) -> Calls:
    """More requests of a high priority than the batch has rows."""
    for _ in range(200):
        yield lambda: up.generation.Generate(ask(new=48, priority=HIGH_PRIORITY))


def prompt_logprobs(up: Beset) -> Calls:
    """Log-probabilities of long prompts."""
    prompt = [20 + i % 300 for i in range(6_000)]
    for _ in range(2):
        yield lambda: up.generation.Generate(
            ask(*prompt, new=1, prompt_logprobs=20, logprobs=20), timeout=60
        )


def started_uploads(up: Beset) -> Calls:
    """Uploads that are started and left."""
    for _ in range(64):
        yield lambda: up.adapters.StartUpload(adapter_pb2.StartUploadRequest())


def half_sent(up: Beset) -> Calls:
    """Messages of which the last byte never comes."""

    async def hold() -> None:
        async with raw_connection(up.address, DEFAULT_WINDOW) as connection:
            for _ in range(16):
                connection.call("/loraplex.v1.GenerationService/Generate", bytes(30_000), end=False)
            await asyncio.sleep(3600)

    for _ in range(16):
        yield hold


def _bytes(number: int, data: bytes) -> bytes:
    """A field of bytes of a message, as protobuf writes it."""
    size, encoded = len(data), bytearray([number << 3 | 2])
    while size >= 128:
        encoded.append(size & 127 | 128)
        size >>= 7
    return bytes([*encoded, size]) + data


OVERLOADS = (
    validations,
    big_messages,
    abandoned_loads,
    costly_sampling,
    high_priority,
    prompt_logprobs,
    started_uploads,
    half_sent,
)
FAST = (validations, big_messages)


@pytest.mark.parametrize(
    "overload",
    [
        pytest.param(each, id=each.__name__, marks=[] if each in FAST else [pytest.mark.slow])
        for each in OVERLOADS
    ],
)
async def test_a_bystander_is_answered_during(
    tmp_path: Path, overload: Callable[[Beset], Calls]
) -> None:
    # Reading the bytes of a large message cannot be refused; a client may make it cost that much.
    pause = 0.25 if overload is big_messages else 0.001
    engine = LARGE_VOCABULARY if overload is costly_sampling else {}
    async with beset(tmp_path, **engine) as up:
        tasks = [asyncio.create_task(up.repeat(call, pause)) for call in overload(up)]
        try:
            await asyncio.sleep(0.5)  # the overload begins
            await asyncio.wait_for(observe(up, 1 if overload is high_priority else ROUNDS), 60)
            assert not any(task.done() for task in tasks), "the overload ended by itself"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        worst = {name: round(max(seconds), 2) for name, seconds in up.seconds.items()}
        print(json.dumps({"overload": overload.__name__, "codes": up.codes, "worst": worst}))
        assert up.sent >= len(tasks)
        limits = LIMITS
        if overload is high_priority:
            limits = {**LIMITS, "Generate": HEAD_START_SECONDS}
        late = {name: seconds for name, seconds in worst.items() if seconds >= limits[name]}
        assert not late, worst
