"""Measures what it takes to bring an adapter to the device, from disk and from host memory."""

from __future__ import annotations

import re
import shutil
import urllib.request
from pathlib import Path

import base
import measure
import random_adapters
from loraplex import Client
from served import Server

COUNT, FITTING = 24, 8
"""Adapters that are loaded, and how many of them fit on the device."""

_SAMPLE = re.compile(r'^loraplex_adapter_load_seconds_(sum|count)\{tier="(\w+)"\} (\S+)$', re.M)


def milliseconds(cache: Path, work: Path, rank: int) -> dict[str, float]:
    """Mean milliseconds of a load by tier, "disk" and "host", and the bytes of a file.

    Adapters of `rank` on all projections are loaded in turn onto a device that holds a third of
    them, so in the second round they come from host memory.
    """
    directories = random_adapters.write(base.ensure(cache=cache), work / "adapters", COUNT, rank)
    size = (directories[0] / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(work / "store", ignore_errors=True)
    settings: dict[str, object] = {
        "cache": cache,
        "store": work / "store",
        "import_root": directories[0].parent,
        "adapter_memory": FITTING * size,
        "host_adapter_memory": 2 * COUNT * size,
    }
    with Server(settings, work / "server.log") as server:
        names = measure.register(server.address, directories)
        with Client(server.address) as client:
            for name in (*names, *names):
                client.load_adapter(name)
        with urllib.request.urlopen(f"http://{server.admin}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    told = {(kind, tier): float(value) for kind, tier, value in _SAMPLE.findall(text)}
    found = {
        tier: 1e3 * told["sum", tier] / told["count", tier]
        for tier in ("disk", "host")
        if told.get(("count", tier))
    }
    return {**found, "bytes": float(size)}
