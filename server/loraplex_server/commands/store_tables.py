"""Output of `loraplex-server store`: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from loraplex_adapters.store import Alias, Rebase, Record, Surveyed
from loraplex_model.base.refusal import Refusal
from rich import box
from rich.table import Table

from loraplex_server.registry import servable

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
    columns = ("adapter", "aliases", "kind", "rank", "size", "digest", "base", since, "labels")
    table = _table(*columns, "state", right=("rank", "size"))
    for record in records:
        when = record.deleted_at or record.created_at
        table.add_row(
            record.id,
            " ".join(record.aliases),
            record.peft_type,
            str(record.rank or ""),
            size_text(record.size_bytes),
            short(record.digest),
            base_text(record),
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


def rebases_table(rebases: Iterable[Rebase]) -> Table:
    """Table with a row for each version that was recorded for another base."""
    table = _table("adapter", "digest", "from", "to", "when")
    for each in rebases:
        table.add_row(
            f"{each.name}@{each.version}",
            short(each.digest),
            servable.base_text(each.old_base, each.old_fingerprint),
            servable.base_text(each.new_base, each.new_fingerprint),
            f"{each.moved_at:%Y-%m-%d %H:%M}",
        )
    return table


def by_base(found: Iterable[Surveyed]) -> dict[str, list[str]]:
    """Ids of versions, by the base for which they were registered."""
    bases: dict[str, list[str]] = {}
    for each in found:
        bases.setdefault(base_text(each), []).append(each.id)
    return bases


def base_text(version: Record | Surveyed) -> str:
    """The base for which a version was registered, such as "tiny (3f2a9c01b7d4)"."""
    return servable.base_text(version.base_name, version.base_fingerprint)


def state_text(record: Record) -> str:
    """Why a version is not served; "" if nothing is known against it."""
    if record.quarantine is not None:
        return f"quarantined: {record.quarantine.reason}"
    return "" if record.is_described else "description damaged"


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
