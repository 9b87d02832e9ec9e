"""Several server processes on one store and one PostgreSQL index, and a load on all of them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from adapters.postgres import new_database
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex import Client, LoraplexError
from rpc.harness import expected, series, write_adapter
from server.test_process import PATH, Process, write_config

STEP_SECONDS = 0.005
DRAIN_SECONDS = 30.0
LONG = 1000
"""Tokens of a stream that lasts five seconds or more, and with it a drain. In that time a client
that goes on calling the draining server uses up its retries."""

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Replica:
    """A server that can be started again at the same address."""

    def __init__(self, folder: Path, store: Path, index: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._file = write_config(
            folder,
            store=store / "store",
            import_root=store / "import",
            port=int(self.address.rpartition(":")[2]),
            drain_timeout=DRAIN_SECONDS,
            max_waiting=1024,
            engine_options={"step_seconds": STEP_SECONDS, "num_blocks": 4096},
        )
        self._index = index
        self._up: Process | None = None

    def begin(self) -> subprocess.Popen[str]:
        """Starts a process, which `ready` waits for."""
        return subprocess.Popen(
            [sys.executable, "-m", "loraplex_server.cli", "serve", "--config", str(self._file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": PATH,
                "OMP_NUM_THREADS": "1",
                "LORAPLEX_STORE_URL": self._index,
            },
        )

    def ready(self, process: subprocess.Popen[str]) -> None:
        """Waits until a process serves."""
        self._up = Process(process)
        assert self._up.grpc == self.address

    @property
    def up(self) -> Process:
        assert self._up is not None
        return self._up

    def metric(self, name: str) -> float:
        """The sum of the samples of a metric."""
        with urllib.request.urlopen(f"http://{self.up.admin}/metrics", timeout=10) as reply:
            found = series(reply.read().decode())
        return sum(value for key, value in found.items() if key.startswith(f"loraplex_{name}["))

    def restart(self) -> None:
        """Stops the server while a stream runs on it, and starts it again.

        Asserts what a client sees meanwhile: health says NOT_SERVING while the port still takes
        calls and metrics are served, the stream ends as if nothing were, and the process with 0.
        """
        host, _, port = self.address.rpartition(":")
        with Client(self.address) as client, grpc.insecure_channel(self.address) as channel:
            stream = client.stream(
                token_ids=[40, 41], max_new_tokens=LONG, temperature=0.0, ignore_eos=True
            )
            next(stream)
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
            self.up.process.send_signal(signal.SIGTERM)
            assert next(watch).status == NOT_SERVING
            with socket.create_connection((host, int(port))):
                pass
            assert health.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
            assert self.metric("build_info") == 1
            assert list(stream.completion().token_ids) == expected([40, 41], LONG)
            assert self.up.wait() == 0
        self.ready(self.begin())

    def kill(self) -> None:
        """Ends the server as a lost machine would."""
        self.up.process.kill()
        self.up.wait()

    def close(self) -> None:
        """Ends the server, if it runs."""
        if self._up is not None and self._up.process.poll() is None:
            self.kill()


@dataclass
class Outcome:
    """What a load experienced. A request is lost if the client library reports an error."""

    completions: int = 0
    streams: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.completions += other.completions
        self.streams += other.streams
        self.lost += other.lost
        self.wrong += other.wrong


class Load:
    """Threads that share a client, generate one call after the other, and compare every answer."""

    def __init__(self, target: str, adapters: list[str], threads: int = 24, streams: float = 0.3):
        self._client = Client(target, timeout=60.0)
        self._adapters = adapters
        self._streams = streams
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.outcome = Outcome()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def end(self) -> Outcome:
        """Lets every client finish its call."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        return self.outcome

    def _run(self, seed: int) -> None:
        own, chance = Outcome(), random.Random(seed)
        while not self._stop.is_set():
            self._call(chance, own)
        with self._lock:
            self.outcome.add(own)

    def _call(self, chance: random.Random, own: Outcome) -> None:
        prompt = [chance.randrange(20, 380) for _ in range(chance.randrange(1, 4))]
        # Short calls: while a server drains, many are begun.
        count = chance.randrange(1, 4)
        adapter = chance.choice(self._adapters)
        options = {
            "token_ids": prompt, "adapter": adapter or None, "max_new_tokens": count,
            "temperature": 0.0, "ignore_eos": True,
        }  # fmt: skip
        is_stream = chance.random() < self._streams
        try:
            if is_stream:
                made = self._client.stream(**options).completion()
            else:
                made = self._client.generate(**options)
        except LoraplexError as error:
            own.lost.append(f"{'stream' if is_stream else 'completion'}: {error!r} {error.code}")
            return
        own.streams += is_stream
        own.completions += not is_stream
        digest = made.adapters[0].digest if adapter else ""
        if list(made.token_ids) != expected(prompt, count, digest):
            own.wrong.append(f"{prompt} {adapter} {made.token_ids}")


@dataclass(frozen=True)
class Fleet:
    """Replicas on one store."""

    replicas: list[Replica]
    store: Path

    @property
    def target(self) -> str:
        """The target of a client of all of them."""
        return "ipv4:" + ",".join(replica.address for replica in self.replicas)

    def adapter(self, seed: int) -> str:
        """Writes an adapter; returns its path below the import root."""
        write_adapter(self.store / "import" / f"a{seed}", seed)
        return f"a{seed}"


@contextmanager
def fleet(folder: Path, index: str, size: int = 2) -> Iterator[Fleet]:
    """Starts `size` servers, all at once."""
    store = folder / "shared"
    (store / "import").mkdir(parents=True)
    with ExitStack() as stack:
        replicas = []
        for number in range(size):
            own = folder / str(number)
            own.mkdir()
            replicas.append(Replica(own, store, index))
            stack.callback(replicas[-1].close)
        for replica, process in [(replica, replica.begin()) for replica in replicas]:
            replica.ready(process)
        yield Fleet(replicas, store)


def index() -> str | None:
    """The URL of a new index; None if there is no PostgreSQL."""
    return new_database()
