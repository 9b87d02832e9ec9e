"""Prints results: tables on a terminal, tab-separated text or JSON elsewhere."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

from loraplex.cli.terminal import can_show
from loraplex.results import (
    AdapterEvent,
    AdapterInfo,
    Completion,
    Finding,
    Finished,
    Registration,
    UploadInfo,
    Validation,
)
from loraplex.streams import Stream
from loraplex.uploads import Progress

# A model may emit terminal control sequences; a terminal must not obey them.
_ON_TERMINAL = dict.fromkeys(
    {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}"
)


def write_text(text: str) -> None:
    """Prints generated text at once; byte for byte unless standard output is a terminal."""
    sys.stdout.write(text.translate(_ON_TERMINAL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: object, flush: bool = False) -> None:
    """Prints dataclasses, alone or within lists and mappings, as one line of JSON.

    Bytes become a list of numbers.

    Characters that standard output cannot show are escaped.
    """

    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, datetime):
            return item.isoformat()
        if isinstance(item, bytes):
            return list(item)
        raise TypeError(type(item).__name__)

    text = json.dumps(value, default=plain, ensure_ascii=False)
    print(text if can_show(text) else json.dumps(value, default=plain), flush=flush)


def write_summary(done: Completion | Finished) -> None:
    """Prints adapters, token counts, finish reason and matched stop, if stderr is a terminal."""
    if not sys.stderr.isatty():
        return
    model = " + ".join(
        f"{a.weight:g} x {a.name}@{a.version} {short(a.digest)}" for a in done.adapters
    )
    tokens = f"{done.usage.prompt_tokens} + {done.usage.completion_tokens} tokens"
    if done.usage.base_prompt_tokens:
        tokens += f" ({done.usage.base_prompt_tokens} of the prompt without the adapter)"
    reason = str(done.finish_reason)
    if done.matched_stop is not None:
        stop = done.matched_stop
        reason += " at token " + str(stop.token_id) if stop.text is None else f" at {stop.text!r}"
    note(f"[{model or 'base model'}, {tokens}, {reason}]")


def write_stream(stream: Stream) -> str:
    """Prints the deltas as they arrive, then the summary; returns the text.

    However the stream ends, the line is ended and a running call cancelled.
    """
    pieces: list[str] = []
    with stream:
        try:
            for delta in stream:
                pieces.append(delta.text)
                write_text(delta.text)
        finally:
            if pieces:
                write_text("\n")
    if stream.finished is not None:
        write_summary(stream.finished)
    return "".join(pieces)


def remark(text: str) -> None:
    """Prints a line on standard error."""
    print(text, file=sys.stderr)


def note(text: str) -> None:
    """Prints a hint on standard error, dimmed on a terminal."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


def write_adapters(adapters: Sequence[AdapterInfo]) -> None:
    """Prints a table; elsewhere than on a terminal with full digests and numbers of bytes."""
    if sys.stdout.isatty():
        write_table(
            ("name", "version", "state", "type", "rank", "size", "on device", "active", "digest"),
            [
                (
                    *(a.name, a.version, "not served" if a.unservable else a.state),
                    *(a.peft_type, a.rank, size(a.size_bytes)),
                    *(size(a.device_bytes) if a.device_bytes else "-", a.active_requests),
                    short(a.digest),
                )
                for a in adapters
            ],
            numbers=("rank", "size", "on device", "active"),
        )
        return
    fields = ("name", "version", "state", "peft_type", "rank", "size_bytes", "device_bytes",
              "active_requests", "digest")  # fmt: skip
    titles = [field.removeprefix("peft_") for field in fields]
    write_table(titles, [[getattr(a, field) for field in fields] for a in adapters])


def write_table(
    titles: Sequence[str], rows: Iterable[Sequence[object]], numbers: Collection[str] = ()
) -> None:
    """Prints a table on a terminal; elsewhere tab-separated lines.

    The columns in `numbers` are aligned to the right.
    """
    if not sys.stdout.isatty():
        for row in (titles, *rows):
            print(*row, sep="\t")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title in numbers else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def write_fields(value: DataclassInstance) -> None:
    """Prints a line `name: value` for each field, except `unservable` if it is None."""
    for item in dataclasses.fields(value):
        content = getattr(value, item.name)
        if item.name != "unservable" or content is not None:
            print(f"{item.name}: {plain(content)}")


def plain(value: object) -> object:
    """Returns the value of a field as text for a line."""
    match value:
        case None:
            return "never"
        case tuple():
            return " ".join(value)
        case datetime():
            return value.isoformat()
        case Finding():
            return f"{value.reason}: {value.message}"
        case Mapping():
            return " ".join(f"{key}={one}" for key, one in sorted(value.items()))
    return value


def write_residency(adapter: AdapterInfo) -> None:
    """Prints an adapter, its state, and whether it is pinned or merged."""
    marks = ["pinned"] * adapter.pinned + ["merged"] * (adapter.merged_bytes > 0)
    print(identity(adapter), adapter.state, *marks)


def write_labels(adapter: AdapterInfo) -> None:
    """Prints an adapter and its labels."""
    print(identity(adapter), plain(adapter.labels) or "no labels")


def write_registration(done: Registration) -> None:
    """Prints the registered adapter, and whether the registration is new."""
    news = "registered" if done.created else "was registered already"
    print(f"{identity(done.adapter)} {news}")
    _write_notes(done.notes)


def write_uploads(uploads: Sequence[UploadInfo]) -> None:
    """Prints a table of unfinished uploads."""
    write_table(
        ("upload", "peer", "bytes", "last change", "expires"),
        [
            (
                *(u.upload_id, u.peer or "-", u.config_bytes + u.weights_bytes),
                *(f"{time:%Y-%m-%d %H:%M:%S}Z" for time in (u.change_time, u.expire_time)),
            )
            for u in uploads
        ],
        numbers=("bytes",),
    )


def write_validation(found: Validation) -> None:
    """Prints the description of an adapter, or a line for each of its faults."""
    for finding in found.findings:
        print(finding.reason, finding.field or "-", finding.message, sep="\t")
    if found.spec is not None:
        write_fields(found.spec)
    _write_notes(found.notes)


def _write_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}")


def write_event(event: AdapterEvent) -> None:
    """Prints a change as one line."""
    about = f" {event.alias}" if event.alias else ""
    print(f"{event.kind}{about} {identity(event.adapter)}", flush=True)


@contextmanager
def progress() -> Iterator[Progress | None]:
    """Shows the progress of an upload; yields None if standard error is no terminal."""
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
    """Returns "name@version digest", or only the digest if no name points to it any more."""
    name = f"{adapter.name}@{adapter.version} " if adapter.name else ""
    return f"{name}{adapter.digest}"


def short(digest: str) -> str:
    """Returns "sha256:" and the first 12 digits."""
    return digest[: len("sha256:") + 12]


def size(count: int) -> str:
    """Returns a number of bytes as text, such as "3.0 MiB"."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
