"""How results look: pleasant on a terminal, plain tab-separated text or JSON elsewhere."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

from loraplex.results import (
    AdapterEvent,
    AdapterInfo,
    FinishReason,
    Registration,
    ResolvedAdapter,
    Usage,
    Validation,
)
from loraplex.uploads import Progress

# A model may emit terminal control sequences; a terminal must not obey them.
_ON_TERMINAL = dict.fromkeys(
    {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}"
)


def write_text(text: str) -> None:
    """Generated text, as it comes; byte for byte unless standard output is a terminal."""
    sys.stdout.write(text.translate(_ON_TERMINAL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(
    value: DataclassInstance | Sequence[DataclassInstance] | dict[str, object], flush: bool = False
) -> None:
    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, datetime):
            return item.isoformat()
        raise TypeError(type(item).__name__)

    print(json.dumps(value, default=plain, ensure_ascii=False), flush=flush)


def write_summary(reason: FinishReason, usage: Usage, adapters: Sequence[ResolvedAdapter]) -> None:
    """Who answered, why it ended and its cost: a dim line on standard error, for terminals only."""
    if not sys.stderr.isatty():
        return
    who = " + ".join(f"{a.weight:g} x {a.name}@{a.version} {short(a.digest)}" for a in adapters)
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    note(f"[{who or 'base model'}, {tokens}, {reason}]")


def remark(text: str) -> None:
    """A line on standard error, terminal or not."""
    print(text, file=sys.stderr)


def note(text: str) -> None:
    """A remark for a person, dim on a terminal."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


def write_adapters(adapters: Sequence[AdapterInfo]) -> None:
    """A table on a terminal; elsewhere a line each, tab-separated, full digests, plain bytes."""
    if not sys.stdout.isatty():
        print(
            "name",
            "version",
            "state",
            "type",
            "rank",
            "size_bytes",
            "device_bytes",
            sep="\t",
            end="\t",
        )
        print("active_requests", "digest", sep="\t")
        for a in adapters:
            print(a.name, a.version, a.state, a.peft_type, a.rank, a.size_bytes, sep="\t", end="\t")
            print(a.device_bytes, a.active_requests, a.digest, sep="\t")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "version", "state", "type"):
        table.add_column(title)
    for title in ("rank", "size", "on device", "active"):
        table.add_column(title, justify="right")
    table.add_column("digest")
    for a in adapters:
        table.add_row(
            a.name,
            str(a.version),
            a.state,
            a.peft_type,
            str(a.rank),
            size(a.size_bytes),
            size(a.device_bytes) if a.device_bytes else "-",
            str(a.active_requests),
            short(a.digest),
        )
    Console().print(table)


def write_adapter(adapter: AdapterInfo) -> None:
    """One adapter, a `name: value` line per field."""
    for item in dataclasses.fields(adapter):
        value = getattr(adapter, item.name)
        if isinstance(value, tuple):
            value = " ".join(value)
        elif isinstance(value, datetime):
            value = value.isoformat()
        elif isinstance(value, Mapping):
            value = labels(value)
        elif value is None:
            value = "never"
        print(f"{item.name}: {value}")


def write_moved(adapter: AdapterInfo, as_json: bool) -> None:
    """An adapter and where it is now."""
    if as_json:
        write_json(adapter)
    else:
        marks = [word for word, true in _marks(adapter) if true]
        print(" ".join([identity(adapter), adapter.state, *marks]))


def write_registration(done: Registration, as_json: bool) -> None:
    """What was registered, and whether it is new."""
    if as_json:
        write_json(done)
    else:
        news = "registered" if done.created else "was registered already"
        print(f"{identity(done.adapter)} {news}")


def write_validation(found: Validation, as_json: bool) -> None:
    """What an adapter is, or a line for each thing that is wrong with it."""
    if as_json:
        write_json(found)
        return
    for finding in found.findings:
        print(finding.reason, finding.field or "-", finding.message, sep="\t")
    if found.spec is not None:
        for item in dataclasses.fields(found.spec):
            value = getattr(found.spec, item.name)
            if isinstance(value, tuple):
                value = " ".join(value)
            elif isinstance(value, Mapping):
                value = labels(value)
            print(f"{item.name}: {value}")


def write_event(event: AdapterEvent) -> None:
    """A change, in a line."""
    about = f" {event.alias}" if event.alias else ""
    print(f"{event.kind}{about} {identity(event.adapter)}", flush=True)


@contextmanager
def progress() -> Iterator[Progress | None]:
    """A bar on standard error that follows an upload; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("upload", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def identity(adapter: AdapterInfo) -> str:
    """`name@version digest`; the digest alone where no name points to it any more."""
    name = f"{adapter.name}@{adapter.version} " if adapter.name else ""
    return f"{name}{adapter.digest}"


def labels(found: Mapping[str, str]) -> str:
    """`key=value key=value`."""
    return " ".join(f"{key}={value}" for key, value in sorted(found.items()))


def _marks(adapter: AdapterInfo) -> tuple[tuple[str, bool], ...]:
    return (("pinned", adapter.pinned), ("merged", bool(adapter.merged_bytes)))


def short(digest: str) -> str:
    """`sha256:` and the first 12 digits."""
    return digest[: len("sha256:") + 12]


def size(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
