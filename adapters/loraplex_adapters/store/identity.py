"""The store's id, in the file `store-id` and in the index: which directory belongs to which index.

Without it a server with the right directory and the wrong database would take every adapter of the
store for one that nothing names, and collect it.
"""

from __future__ import annotations

from pathlib import Path

from loraplex_model.base.durable import flush, flush_file
from loraplex_model.base.faults import reach

from loraplex_adapters.store.disk import disk_errors

_FILE = "store-id"


def read_id(root: Path) -> str | None:
    """What the directory says; None if nothing. Raises Refusal(STORE_UNAVAILABLE)."""
    with disk_errors():
        try:
            return (root / _FILE).read_text("ascii", errors="replace").strip()
        except FileNotFoundError:
            return None


def write_id(root: Path, store_id: str) -> None:
    """Writes it, whole or not at all; the store's lock is held."""
    new = root / f"{_FILE}.new"
    with disk_errors():
        reach("store.identity.write")
        with open(new, "wb") as file:
            file.write(f"{store_id}\n".encode("ascii"))
            reach("store.identity.sync")
            flush_file(file)
        reach("store.identity.rename")
        new.rename(root / _FILE)
        reach("store.identity.sync-directory")
        flush(root)
