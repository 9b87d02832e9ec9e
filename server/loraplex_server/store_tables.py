"""Output of `loraplex-server store`: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraplex_adapters.store import Alias, Collected, Record, Verified
from rich import box
from rich.table import Table

_HEX = 12
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def record_json(record: Record) -> dict[str, Any]:
    """All fields of a version."""
    return {
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "peft_type": record.peft_type,
        "rank": record.rank,
        "target_modules": list(record.target_modules),
        "virtual_tokens": record.virtual_tokens,
        "size_bytes": record.size_bytes,
        "base_model": record.base_model,
        "base_fingerprint": record.base_fingerprint,
        "created_at": record.created_at.isoformat(),
        "deleted_at": None if record.deleted_at is None else record.deleted_at.isoformat(),
        "aliases": list(record.aliases),
        "labels": dict(record.labels),
        "provenance": dict(record.provenance),
    }


def alias_json(alias: Alias) -> dict[str, Any]:
    """An alias and the version that it points to."""
    return {
        "alias": alias.alias,
        "name": alias.name,
        "version": alias.version,
        "digest": alias.digest,
        "updated_at": alias.updated_at.isoformat(),
    }


def verified_json(verified: Verified) -> dict[str, Any]:
    """Result of verifying an adapter; `error` is None if it is intact."""
    return {
        "digest": verified.digest,
        "versions": list(verified.versions),
        "error": None if verified.error is None else verified.error.message,
    }


def collected_json(collected: Collected, dry_run: bool) -> dict[str, Any]:
    """Result of a garbage collection, or of its dry run."""
    return {
        "dry_run": dry_run,
        "versions": list(collected.versions),
        "aliases": list(collected.aliases),
        "digests": list(collected.digests),
        "bytes": collected.bytes,
        "uploads": list(collected.uploads),
    }


def records_table(records: Iterable[Record], *, deleted: bool = False) -> Table:
    """Table with a row for each version."""
    since = "deleted" if deleted else "registered"
    columns = ("adapter", "aliases", "kind", "rank", "size", "digest", since, "labels")
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


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
