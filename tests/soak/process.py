"""The server under soak: the real program as a process, and what it takes of the machine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

TESTS = Path(__file__).resolve().parents[1]
READY = re.compile(r"ready: grpc (\S+) admin (\S+) ")


@dataclass(frozen=True, slots=True)
class Taken:
    """What the processes of a server hold at one time.

    Attributes:
        mb: resident memory in MB, by process.
        open: number of open descriptors, by process and kind, such as "front: socket".
        threads: number of threads, by process.
        series: the series of /metrics.
    """

    mb: dict[str, float]
    open: Counter[str]
    threads: Counter[str]
    series: frozenset[str]

    def more_than(self, before: Taken) -> dict[str, int]:
        """The descriptors, threads and series that are there in addition."""
        added: dict[str, int] = dict(self.open - before.open)
        added |= {f"{name}: thread": n for name, n in (self.threads - before.threads).items()}
        return added | dict.fromkeys(self.series - before.series, 1)


def taken_of(processes: Mapping[str, psutil.Process], series: Iterable[str]) -> Taken:
    """What these processes hold now, by their names."""
    return Taken(
        mb={name: each.memory_info().rss / 1e6 for name, each in processes.items()},
        open=Counter(
            f"{name}: {kind}" for name, each in processes.items() for kind in opened(each)
        ),
        threads=Counter({name: each.num_threads() for name, each in processes.items()}),
        series=frozenset(series),
    )


def opened(process: psutil.Process) -> Iterator[str]:
    """The kind of each open descriptor: "pipe", the state of a TCP connection, a file's path."""
    states = {each.fd: f"TCP {each.status}" for each in process.net_connections("tcp")}
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            kind = os.readlink(link)
            yield states.get(int(link.name)) or (
                kind if kind.startswith("/") else kind.partition(":[")[0]
            )


class ServerProcess:
    """`loraplex-server serve`, which may be killed and started again on the same ports and files.

    Attributes:
        address: host:port of the gRPC services, the same after each start.
        starts: number of starts.
    """

    def __init__(self, settings: Mapping[str, object], log: Path) -> None:
        """`settings` as in a TOML file; the ports may be 0. The log of all starts is `log`."""
        self._settings = dict(settings)
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self.address = ""
        self._admin = ""
        self.starts = 0

    async def start(self) -> None:
        """Returns when the server is ready. Raises RuntimeError if it ends before."""
        variables = {
            f"LORAPLEX_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in self._settings.items()
        }
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with self._log.open("a") as log:
            self._process = await asyncio.create_subprocess_exec(
                *("loraplex-server", "serve"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **variables},
            )
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode()
        found = READY.match(line)
        if found is None:
            raise RuntimeError(f"the server did not start; see {self._log}")
        self.address, self._admin = found[1], found[2]
        self._settings["port"] = int(self.address.rpartition(":")[2])
        self._settings["admin_port"] = int(self._admin.rpartition(":")[2])
        self.starts += 1

    async def kill(self) -> None:
        """Kills the front process; its engine must then end by itself."""
        engines = self.engines()
        assert self._process is not None
        self._process.kill()
        await self._process.wait()
        await asyncio.to_thread(psutil.wait_procs, engines, 30)
        left = [each.pid for each in engines if each.is_running()]
        assert not left, f"engine processes outlive their front: {left}"

    async def stop(self) -> int:
        """Ends the server with SIGTERM; returns its exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(90):
            return await self._process.wait()

    def engines(self) -> list[psutil.Process]:
        """The processes that the front has started."""
        assert self._process is not None
        try:
            return list(psutil.Process(self._process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def kill_engine(self) -> None:
        """Kills the engine process."""
        for engine in self.engines():
            engine.kill()

    async def scrape(self) -> dict[str, float]:
        """The samples of /metrics, by name and labels."""

        def read() -> str:
            with urllib.request.urlopen(f"http://{self._admin}/metrics", timeout=10) as reply:
                return str(reply.read().decode())

        return {
            f"{sample.name}{sorted(sample.labels.items()) or ''}": sample.value
            for family in text_string_to_metric_families(await asyncio.to_thread(read))
            for sample in family.samples
        }

    async def taken(self) -> Taken:
        """What the processes hold now."""
        assert self._process is not None
        front = psutil.Process(self._process.pid)
        processes = {"front": front}
        for each in self.engines():
            with suppress(psutil.NoSuchProcess):
                command = each.cmdline()
                name = command[command.index("-m") + 1] if "-m" in command else each.name()
                processes[name if name not in processes else f"{name} {len(processes)}"] = each
        return taken_of(processes, await self.scrape())

    def connections(self) -> list[str]:
        """The TCP connections to the gRPC port, by state: those that clients have not closed."""
        assert self._process is not None
        port = int(self.address.rpartition(":")[2])
        return [
            f"a connection ({each.status})"
            for each in psutil.Process(self._process.pid).net_connections("tcp")
            if each.laddr.port == port and each.status != psutil.CONN_LISTEN
        ]

    @contextmanager
    def index_away(self) -> Iterator[None]:
        """Locks the index of the store, as a database that does not answer, within the context."""
        file = Path(str(self._settings["store"])) / "index.sqlite3"
        with sqlite3.connect(file, isolation_level=None, timeout=30) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")
        connection.close()


def settings_for(folder: Path, **more: Any) -> dict[str, object]:
    """Settings of a server whose files are below `folder`."""
    return {
        "store": str(folder / "store"),
        "import_root": str(folder / "import"),
        "port": 0,
        "admin_port": 0,
        "write_stall_timeout": 3.0,
        "log_format": "json",
        **more,
    }
