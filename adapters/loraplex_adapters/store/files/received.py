"""How much of an upload's files has been acknowledged, in the file `received.json` of the upload.

After a power failure a file may be longer than what was acknowledged, with zeros or other bytes at
its end. So the size of the file does not show how much of it the client has sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from loraplex_model.base.durable import flush, read_regular, write_atomically
from loraplex_model.base.faults import reach

RECEIVED = "received.json"


def record_received(folder: Path, sizes: Mapping[str, int]) -> None:
    """Records the acknowledged sizes of files by name; the files' bytes must have been flushed.

    On return the names of the files are on the disk too.
    """
    reach("store.received.write")
    write_atomically(folder / RECEIVED, json.dumps(dict(sizes)).encode(), mode=0o600)
    reach("store.received.sync-directory")
    flush(folder)


def cut_to_received(folder: Path, files: tuple[str, ...]) -> dict[str, int]:
    """Removes bytes beyond those that were acknowledged; returns the sizes of `files`.

    The size of a file counts as acknowledged if there is no record, which earlier versions of the
    store did not write. With a damaged record nothing counts as acknowledged, so that the client
    sends everything again. The caller holds the upload's lock. Raises OSError.
    """
    sizes = {name: _size(folder / name) for name in files}
    try:
        recorded = _recorded(folder / RECEIVED)
    except FileNotFoundError:
        return sizes
    for name in files:
        if sizes[name] > recorded.get(name, 0):
            sizes[name] = recorded.get(name, 0)
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.ftruncate(descriptor, sizes[name])
            finally:
                os.close(descriptor)
    return sizes


def _recorded(file: Path) -> dict[str, int]:
    """The acknowledged sizes; empty if the record is damaged. Raises OSError."""
    try:
        found = json.loads(read_regular(file))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: size for name, size in found.items() if type(size) is int and size >= 0}


def _size(file: Path) -> int:
    try:
        return file.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
