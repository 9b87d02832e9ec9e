"""The store's id, kept in the file `store-id` and in the index, so that the two can be matched.

Without the id, a server with the right directory and the wrong database would find no name for any
stored adapter, and would remove them all as garbage.
"""

from __future__ import annotations

from pathlib import Path

from loraplex_model.base.durable import flush, read_regular, write_atomically
from loraplex_model.base.faults import reach

from loraplex_adapters.store.disk import disk_errors

_FILE = "store-id"


def read_id(root: Path) -> str | None:
    """Returns the id in the directory; None if there is none. Raises Refusal(STORE_UNAVAILABLE)."""
    with disk_errors():
        try:
            return read_regular(root / _FILE).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None


def write_id(root: Path, store_id: str) -> None:
    """Writes the id atomically. The caller holds the store's lock."""
    with disk_errors():
        reach("store.identity.write")
        write_atomically(root / _FILE, f"{store_id}\n".encode("ascii"), mode=0o644)
        reach("store.identity.sync-directory")
        flush(root)
