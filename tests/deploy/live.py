"""A real server over the oracle engine, and a real Prometheus that scrapes it, each as a process."""

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

import numpy as np
from deploy.dashboard import ROOT
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH = 16
PROJECTIONS = {"q_proj": (WIDTH, WIDTH), "v_proj": (WIDTH, WIDTH)}
CRASH_TOKEN = 7
"""A prompt that holds it kills the engine process."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a started server answers."""

    target: str
    admin: str


def write_adapter(folder: Path, seed: int) -> None:
    """A PEFT LoRA of rank 2 for the oracle's one layer."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for module, (inputs, outputs) in PROJECTIONS.items():
        prefix = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((2, inputs), np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((outputs, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(PROJECTIONS)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One token a word: `w3` is 3."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@contextmanager
def server(folder: Path, **options: Any) -> Iterator[Server]:
    """A server with the oracle's `options` and an import root in `folder`; stopped by SIGTERM."""
    write_tokenizer(folder / "tokenizer", 512)
    oracle = {
        "num_slots": 8,
        "adapter_budget_bytes": 1 << 20,
        "projections": PROJECTIONS,
        "tokenizer_path": str(folder / "tokenizer"),
        "crash_token": CRASH_TOKEN,
        "forbidden": [CRASH_TOKEN],
        **options,
    }
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests"),
        "LORAPLEX_ENGINE_FACTORY": "engine.oracle:build",
        "LORAPLEX_ENGINE_OPTIONS": json.dumps(oracle),
        "LORAPLEX_STORE": str(folder / "store"),
        "LORAPLEX_IMPORT_ROOT": str(folder / "import"),
        "LORAPLEX_PORT": "0",
        "LORAPLEX_ADMIN_PORT": "0",
        "LORAPLEX_LOG_LEVEL": "warning",
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
        yield Server(words[2], words[4])
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
        """The `data` of a reply. Raises URLError, and RuntimeError for a query that is wrong."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{parameters}: {error.read().decode()}") from error

    def values(self, expr: str, start: float, end: float) -> list[float]:
        """All finite values of a query over a time range, of all its series."""
        data = self.api("query_range", query=expr, start=f"{start}", end=f"{end}", step="1")
        numbers = (float(value) for series in data["result"] for _, value in series["values"])
        return [number for number in numbers if math.isfinite(number)]


@contextmanager
def prometheus(binary: str, folder: Path, target: str) -> Iterator[Prometheus]:
    """Scrapes `target` every second, with the repository's own alerts loaded."""
    rules = ROOT / "deploy" / "prometheus" / "alerts.yml"
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: [{json.dumps(str(rules))}]\n"
        "scrape_configs:\n"
        "  - job_name: loraplex\n"
        f"    static_configs: [{{targets: [{json.dumps(target)}]}}]\n"
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


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Polls until the condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not come true within {seconds} s")
        time.sleep(0.1)
