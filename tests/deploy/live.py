"""A real server over the oracle engine and a real Prometheus that scrapes it, as processes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from deploy.dashboard import ROOT
from rpc.harness import config_for


@dataclass(frozen=True, slots=True)
class Server:
    """Where a started server answers; `gateway` is "" without one."""

    target: str
    admin: str
    gateway: str = ""


@contextmanager
def server(folder: Path, **settings: Any) -> Iterator[Server]:
    """A server over the oracle with an import root in `folder`; stopped by SIGTERM.

    `settings` are passed on in its environment.
    """
    given = {
        f"LORAPLEX_{name.upper()}": json.dumps(value)
        if isinstance(value, list | bool)
        else str(value)
        for name, value in settings.items()
    }
    config = config_for(folder, **settings)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "LORAPLEX_ENGINE_FACTORY": config.engine_factory,
        "LORAPLEX_STORE": str(config.store),
        "LORAPLEX_IMPORT_ROOT": str(config.import_root),
        "LORAPLEX_PORT": "0",
        "LORAPLEX_ADMIN_PORT": "0",
        "LORAPLEX_LOG_LEVEL": "warning",
        **given,
        "LORAPLEX_ENGINE_OPTIONS": json.dumps(config.engine_options),
    }
    command = [Path(sys.executable).with_name("loraplex-server"), "serve"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        words = process.stdout.readline().split()
        if words[:2] != ["ready:", "grpc"]:
            raise RuntimeError("no server: " + (folder / "server.log").read_text()[-4000:])
        found = dict(zip(words[1::2], words[2::2], strict=False))
        yield Server(words[2], words[4], found.get("http", ""))
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
    assert process.returncode == 0, (folder / "server.log").read_text()[-4000:]


class Prometheus:
    """A running Prometheus, through its HTTP API."""

    def __init__(self, address: str) -> None:
        self._address = address

    def api(self, path: str, **parameters: str) -> Any:
        """The `data` of a reply. Raises URLError; a wrong query is an HTTPError with code 400."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]

    def values(self, expr: str, start: float, end: float) -> list[float]:
        """All finite values of a query over a time range, of all its series."""
        data = self.api("query_range", query=expr, start=f"{start}", end=f"{end}", step="1")
        numbers = (float(value) for series in data["result"] for _, value in series["values"])
        return [number for number in numbers if math.isfinite(number)]


@contextmanager
def prometheus(binary: str, folder: Path, target: str, gateway: str = "") -> Iterator[Prometheus]:
    """Scrapes `target`, and a `gateway`, every second, with the repository's own alerts loaded."""
    rules = ROOT / "deploy" / "prometheus" / "alerts.yml"
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: [{json.dumps(str(rules))}]\n"
        "scrape_configs:\n"
        "  - job_name: loraplex\n"
        f"    static_configs: [{{targets: [{json.dumps(target)}]}}]\n" + _of_gateway(gateway)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    client = Prometheus(address)

    def ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError((folder / "prometheus.log").read_text()[-4000:])
        try:
            return bool(client.api("query", query='up{job="loraplex"} == 1')["result"])
        except urllib.error.URLError:
            return False

    try:
        wait_for(ready, 60)
        yield client
    finally:
        process.terminate()
        process.wait(60)


def _of_gateway(address: str) -> str:
    """The job of the gateway as the repository's own configuration has it, for this address."""
    if not address:
        return ""
    given = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = [each for each in given["scrape_configs"] if each["job_name"] == "loraplex-gateway"]
    return f"  - {json.dumps({**job, 'static_configs': [{'targets': [address]}]})}\n"


def scraped(prometheus: Prometheus) -> int:
    """How often the server has been scraped."""
    data = prometheus.api("query", query='count_over_time(up{job="loraplex"}[10m])')
    return int(float(data["result"][0]["value"][1])) if data["result"] else 0


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Polls until the condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not come true within {seconds} s")
        time.sleep(0.1)
