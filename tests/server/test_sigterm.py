"""SIGTERM at any moment: the process ends in time and well, and every call ends.

A moment is made from its seed: how long after which stage of its life a server gets the signal.
Meanwhile it has everything to do: unary calls and streams, adapters that are registered, uploaded
and watched, jobs that train and deliver, and clients that never read, send half of a message, or
only hold connections.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.store import Store
from rpc.harness import ask, streamed, write_adapter
from rpc.raw_http2 import DEFAULT_WINDOW, raw_connection
from rpc.training_jobs import jobs_dir, order, settings
from server.test_process import TESTS, children, is_alive, write_config

DRAIN_SECONDS = 0.5
EXIT_SECONDS = 20.0
"""What a shutdown may take beyond the drain; see docs/operations.md."""

SLOW = {"step_seconds": 0.002, "num_blocks": 1024}
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@dataclass
class Life:
    """A server process from its start to its end, and what its clients experienced."""

    folder: Path
    process: asyncio.subprocess.Process
    signalled: bool = False
    log: list[str] = field(default_factory=list)
    outcomes: list[tuple[str, object, str | None]] = field(default_factory=list)
    """Name of each call that has ended, its status code, None for success, and its details."""

    async def follow(self) -> None:
        """Keeps what the server logs."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode())

    async def until_logged(self, text: str) -> None:
        """Waits for a line with `text`."""
        while not any(text in line for line in self.log):  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def count(self, name: str, call: Awaitable[object]) -> bool:
        """Awaits a call; returns whether it succeeded."""
        try:
            await call
        except grpc.RpcError as error:
            self.outcomes.append((name, error.code(), error.details()))
            return False
        self.outcomes.append((name, None, None))
        return True


async def begin(folder: Path, **more: Any) -> Life:
    """Starts a server."""
    made = {**settings(folder), "drain_timeout": DRAIN_SECONDS, "engine_options": SLOW, **more}
    file = write_config(folder, **made)
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loraplex_server.cli", "serve", "--config", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    return Life(folder, process)


def seconds_between(random_: random.Random, least: float, most: float) -> float:
    return least + (most - least) * random_.random()


async def repeat(life: Life, name: str, call: Callable[[], Awaitable[object]]) -> None:
    """Calls until the server is gone."""
    while await life.count(name, call()) or not life.signalled:  # noqa: ASYNC110
        await asyncio.sleep(0.03)


async def read_all(call: Any) -> None:
    async for _ in call:
        pass


def upload(address: str, folder: Path) -> None:
    """Uploads an adapter in small pieces. Not with grpc.aio: it loses the status of a stream that
    ends while it writes."""
    config = (folder / CONFIG_FILE).read_bytes()
    weights = (folder / WEIGHTS_FILE).read_bytes()
    pb = adapter_pb2
    with grpc.insecure_channel(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        upload_id = stub.StartUpload(pb.StartUploadRequest()).upload_id

        def pieces() -> Iterator[pb.UploadAdapterRequest]:
            sizes = {"config_size": len(config), "weights_size": len(weights)}
            head = pb.UploadHeader(upload_id=upload_id, name="sent", replace=True, **sizes)
            yield pb.UploadAdapterRequest(header=head)
            for file, data in (
                (pb.ADAPTER_FILE_CONFIG, config),
                (pb.ADAPTER_FILE_WEIGHTS, weights),
            ):
                for at in range(0, len(data), 97):
                    time.sleep(0.005)
                    chunk = pb.UploadChunk(file=file, offset=at, data=data[at : at + 97])
                    yield pb.UploadAdapterRequest(chunk=chunk)

        stub.UploadAdapter(pieces())


async def honest(life: Life, address: str) -> None:
    """Clients that behave, until the server is gone."""
    async with grpc.aio.insecure_channel(address) as channel:
        generation = generation_pb2_grpc.GenerationServiceStub(channel)
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        training = training_pb2_grpc.TrainingServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        pb = adapter_pb2
        made = life.folder / "import" / "made"
        new = pb.RegisterAdapterRequest(name="made", path="made", replace=True, load=True)
        unload = pb.UnloadAdapterRequest(adapter_id="made")
        while not await life.count("register", adapters.RegisterAdapter(new)):
            if life.signalled:
                return
            await asyncio.sleep(0.01)
        delivery = training_pb2.TrainingDelivery(replace=True, load=True, alias="newest")
        job = order("step 1", f"publish {made}", delivery=delivery)

        async def train() -> None:
            reply = await training.CreateJob(job)
            watch = training_pb2.WatchJobRequest(job_id=reply.job.job_id)
            await read_all(training.WatchJob(watch))

        async with asyncio.TaskGroup() as group:
            for name, call in {
                "generate": lambda: generation.Generate(ask(new=20, adapter="made")),
                "base": lambda: generation.Generate(ask(new=5)),
                "stream": lambda: read_all(generation.GenerateStream(streamed(ask(new=100)))),
                "long": lambda: read_all(generation.GenerateStream(streamed(ask(new=900)))),
                "list": lambda: adapters.ListAdapters(pb.ListAdaptersRequest()),
                "register": lambda: adapters.RegisterAdapter(new),
                "unload": lambda: adapters.UnloadAdapter(unload),
                "upload": lambda: asyncio.to_thread(upload, address, made),
                "watch": lambda: read_all(adapters.WatchAdapters(pb.WatchAdaptersRequest())),
                "health": lambda: read_all(health.Watch(health_pb2.HealthCheckRequest())),
                "train": train,
            }.items():
                group.create_task(repeat(life, name, call))


async def hostile(stack: AsyncExitStack, address: str, admin: str) -> None:
    """Clients that hold all that they can, until `stack` is closed."""
    deaf = await stack.enter_async_context(raw_connection(address, window=0))
    half = await stack.enter_async_context(raw_connection(address, DEFAULT_WINDOW))
    for service, method in (
        ("loraplex.v1.GenerationService", "GenerateStream"),
        ("loraplex.v1.GenerationService", "Generate"),
        ("loraplex.v1.AdapterService", "WatchAdapters"),
        ("loraplex.v1.AdapterService", "ListAdapters"),
        ("loraplex.v1.AdapterService", "UploadAdapter"),
        ("loraplex.v1.TrainingService", "ListJobs"),
        ("grpc.health.v1.Health", "Watch"),
        ("grpc.health.v1.Health", "Check"),
        ("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"),
    ):
        path = f"/{service}/{method}"
        body = b"x" * 5000
        half.call(path, body, end=False)
        half.call(path)
        if method == "GenerateStream":
            body = streamed(ask(new=900)).SerializeToString()
        elif method == "Generate":
            body = ask(new=900).SerializeToString()
        else:
            body = b""
        for _ in range(3):
            deaf.call(path, body)
    for _ in range(5):
        await stack.enter_async_context(raw_connection(address))
    host, _, port = admin.rpartition(":")
    for _ in range(20):
        held = stack.enter_context(socket.create_connection((host, int(port))))
        held.sendall(b"GET /metrics HTTP/1.1\r\n")


def descendants(pid: int) -> list[int]:
    """Processes of a process, and theirs."""
    found = children(pid)
    for child in list(found):
        with suppress(OSError):
            found += descendants(child)
    return found


async def live(folder: Path, seed: int) -> None:
    """One life of a server that gets SIGTERM at the moment that `seed` chooses."""
    random_ = random.Random(seed)
    write_adapter(folder / "import" / "made")
    life = await begin(folder)
    following = asyncio.create_task(life.follow())
    assert life.process.stdout is not None
    async with AsyncExitStack() as stack:
        stack.callback(lambda: life.process.returncode is None and life.process.kill())
        calls: asyncio.Task[None] | None = None
        if random_.random() < 0.25:  # while it starts
            await life.until_logged("config: ")
            await asyncio.sleep(seconds_between(random_, 0, 1.0))
        else:
            line = (await life.process.stdout.readline()).decode()
            assert line.startswith("ready: grpc "), (line, life.log)
            _, _, address, _, admin, *_ = line.split()
            calls = asyncio.create_task(honest(life, address))
            await hostile(stack, address, admin)
            await asyncio.sleep(seconds_between(random_, 0, 0.8))
            if random_.random() < 0.2:  # while the engine is replaced
                with suppress(IndexError, ProcessLookupError):
                    os.kill(children(life.process.pid)[0], signal.SIGKILL)
                await asyncio.sleep(seconds_between(random_, 0, 0.5))
        left = descendants(life.process.pid)
        life.signalled = True
        life.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = await asyncio.wait_for(life.process.wait(), DRAIN_SECONDS + EXIT_SECONDS + 10)
        about = f"seed {seed}, {time.monotonic() - began:.1f} s: {''.join(life.log)}"
        await following
        assert code == 0, about
        assert not any("Traceback" in line or "too long" in line for line in life.log), about
        if calls is not None:
            await asyncio.wait_for(calls, 20)
        wrong = {o for o in life.outcomes if o[1] not in {None, UNAVAILABLE}}
        assert not wrong, (wrong, about)
        for _ in range(200):
            if not any(is_alive(pid) for pid in left):
                break
            await asyncio.sleep(0.05)
        assert not any(is_alive(pid) for pid in left), about
    check_files(folder)


def check_files(folder: Path) -> None:
    """What the server left can be used."""
    store = Store(folder / "store")
    for record in store.current():
        assert (store.path(record.digest) / WEIGHTS_FILE).is_file()
    store.close()
    for record in jobs_dir(folder).glob("*/job.json"):
        assert json.loads(record.read_text())["state"]
    shutil.rmtree(folder)


async def live_all(folder: Path, seeds: range, at_once: int) -> None:
    slots = asyncio.Semaphore(at_once)

    async def one(seed: int) -> None:
        async with slots:
            (folder / str(seed)).mkdir()
            await live(folder / str(seed), seed)

    async with asyncio.TaskGroup() as group:
        for seed in seeds:
            group.create_task(one(seed))


@pytest.mark.fault("sigterm-anywhere")
@pytest.mark.fault("drain-unbounded")
async def test_sigterm_ends_a_server_well_at_some_moments(tmp_path: Path) -> None:
    await live_all(tmp_path, range(3), at_once=3)


@pytest.mark.slow
@pytest.mark.fault("sigterm-anywhere")
@pytest.mark.fault("drain-unbounded")
async def test_sigterm_ends_a_server_well_at_fifty_moments(tmp_path: Path) -> None:
    await live_all(tmp_path, range(1000, 1050), at_once=8)
