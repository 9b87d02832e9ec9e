"""Records a run in its directory: every event, the machine, the answers.

    <out>/metrics.jsonl       every event, as a line of JSON (see `lines`)
    <out>/environment.json    versions and the machine, without names of hosts or paths
    <out>/samples.md          answers before and after training

A run can be resumed without these files; it needs its checkpoints only.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
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
    until_failure,
)
from loraplex_training.report.lines import decode, encode

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
SAMPLES = "samples.md"

_PACKAGES = (
    "loraplex", "torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "numpy",
)  # fmt: skip


class RunRecord:
    """An `Observer` that writes a run's record.

    A run that is resumed after a crash repeats steps; their first events are removed. A full disk
    ends the record, not the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @until_failure("the run is no longer recorded", OSError)
    def on(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._begin(event)
        with (self._folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(encode(event) + "\n")
        if isinstance(event, RunEnded):
            (self._folder / SAMPLES).write_text(samples(read(self._folder)), "utf-8")

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
    """Yields the recorded events of a run, none if there is no record.

    A last line that a crash cut short is skipped.
    """
    with contextlib.suppress(FileNotFoundError), (folder / METRICS).open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield decode(line)


def samples(events: Iterable[Event]) -> str:
    """Returns all sampled answers as Markdown, grouped by job and prompt."""
    parts: dict[tuple[str, str], list[str]] = {}
    for event in events:
        if isinstance(event, Sampled):
            part = parts.setdefault((event.job, event.prompt), [])
            if not part:
                part += [f"## {event.job}", block(event.prompt)]
                part += ["expected:", block(event.reference)]
            part += [f"{event.when}:", block(event.answer)]
    return "".join("\n\n".join(part) + "\n\n" for part in parts.values())


def block(text: str, limit: int = 1 << 16) -> str:
    """Returns a text, cut to `limit` characters, as a fenced Markdown block that it cannot end."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def environment(device: str) -> dict[str, object]:
    """Returns versions and the kind of machine; nothing that identifies the machine itself."""
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
    """Returns the processor's name, from Linux if possible."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _step(event: Event) -> int:
    """Returns the step that an event belongs to; 0 for events of the run itself."""
    return event.step if isinstance(event, StepDone | Evaluated | Sampled | JobEnded) else 0
