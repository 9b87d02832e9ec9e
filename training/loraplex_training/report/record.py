"""A run's folder as it fills: every event, the machine it ran on, and what can be read of both.

    <out>/metrics.jsonl       every event, as `event_lines` writes them
    <out>/environment.json    versions and the machine, without names of hosts or paths
    <out>/samples.md          answers before and after

Nothing here is needed to go on with a run: that is in its checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loraplex_training.report.events import (
    Evaluated,
    Event,
    JobEnded,
    RunEnded,
    RunStarted,
    Sampled,
    StepDone,
)
from loraplex_training.report.lines import decode, encode

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
SAMPLES = "samples.md"

_PACKAGES = (
    "loraplex", "torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "numpy",
)  # fmt: skip


class Record:
    """An `Observer` that writes a run's folder.

    A run that goes on after a crash takes steps a second time: what was written of them goes. A
    full disk stops the record, not the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._broken = False

    def on(self, event: Event) -> None:
        if self._broken:
            return
        try:
            if isinstance(event, RunStarted):
                self._begin(event)
            with (self._folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(encode(event) + "\n")
            if isinstance(event, RunEnded):
                (self._folder / SAMPLES).write_text(samples(list(read(self._folder))), "utf-8")
        except OSError as error:
            self._broken = True
            log.warning("the run is no longer recorded: %s: %s", self._folder, error.strerror)

    def _begin(self, event: RunStarted) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(environment(event.device), indent=2) + "\n"
        (self._folder / ENVIRONMENT).write_text(text, "utf-8")
        metrics = self._folder / METRICS
        kept = [e for e in read(self._folder) if _step(e) <= event.step] if event.step else []
        fresh = metrics.with_suffix(".new")
        fresh.write_text("".join(encode(e) + "\n" for e in kept), "utf-8")
        fresh.replace(metrics)


def read(folder: Path) -> Iterator[Event]:
    """The events that a run's folder holds; nothing where there are none.

    A last line that a crash cut short is left out.
    """
    with contextlib.suppress(FileNotFoundError), (folder / METRICS).open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield decode(line)


def samples(events: Sequence[Event]) -> str:
    """Every answer that was shown, as Markdown, those of a job and a prompt together."""
    parts: dict[tuple[str, str], list[str]] = {}
    for event in events:
        if isinstance(event, Sampled):
            part = parts.setdefault((event.job, event.prompt), [])
            if not part:
                part += [f"## {event.job}", block(event.prompt), "wanted:", block(event.reference)]
            when = f"after {event.step} steps:" if event.step else "before:"
            part += [when, block(event.answer)]
    return "".join("\n\n".join(part) + "\n\n" for part in parts.values())


def block(text: str, limit: int = 1 << 16) -> str:
    """A text in a fenced block of Markdown, as it is, whatever marks it holds."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def environment(device: str) -> dict[str, object]:
    """Versions and the machine; nothing that tells one machine of a kind from another."""
    import torch

    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine: dict[str, object] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name(torch.device(device))
    return {"python": sys.version.split()[0], "versions": versions, "machine": machine}


def _processor() -> str:
    """The processor's name where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _step(event: Event) -> int:
    """The step that an event belongs to; a run's own events go with the step before them."""
    return event.step if isinstance(event, StepDone | Evaluated | Sampled | JobEnded) else 0
