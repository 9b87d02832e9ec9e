"""Output of `loraplex-server store`: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from loraplex_adapters.store import Alias, Record
from loraplex_model.base.refusal import Refusal
from rich import box
from rich.table import Table

_HEX = 12
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plain(value: Any) -> Any:
    """Returns a value for JSON: a dataclass by its fields, a time in ISO 8601, a refusal's text."""
    match value:
        case datetime():
            return value.isoformat()
        case Refusal():
            return value.message
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def records_table(records: Iterable[Record], *, deleted: bool = False) -> Table:
    """Table with a row for each version."""
    since = "deleted" if deleted else "registered"
    columns = ("adapter", "aliases", "kind", "rank", "size", "digest", since, "labels", "state")
    table = _table(*columns, right=("rank", "size"))
    for record in records:
        when = record.deleted_at or record.created_at
        table.add_row(
            record.id,
            " ".join(record.aliases),
            record.peft_type,
            str(record.rank or ""),
            size_text(record.size_bytes),
            short(record.digest),
            f"{when:%Y-%m-%d %H:%M}",
            labels_text(record.labels),
            state_text(record),
        )
    return table


def aliases_table(aliases: Iterable[Alias]) -> Table:
    """Table with a row for each alias."""
    table = _table("alias", "adapter", "digest", "moved")
    for alias in aliases:
        table.add_row(
            alias.alias,
            f"{alias.name}@{alias.version}",
            short(alias.digest),
            f"{alias.updated_at:%Y-%m-%d %H:%M}",
        )
    return table


def short(digest: str) -> str:
    """First hex digits of a digest."""
    return digest.removeprefix("sha256:")[:_HEX]


def size_text(size: float) -> str:
    """A number of bytes as text, such as "1.5 MiB"."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels as text, such as "team=ops stage=test"."""
    return " ".join(f"{key}={value}" for key, value in labels.items())


def state_text(record: Record) -> str:
    """Why a version is not served; "" if nothing is known against it."""
    return "" if record.quarantine is None else f"quarantined: {record.quarantine.reason}"


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
