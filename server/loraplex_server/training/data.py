"""A job's own copy of its examples, from the client's bytes or from a file of the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loraplex_adapters.format.files import open_below, open_root
from loraplex_model.base.durable import flush_file, is_disk_full
from loraplex_model.base.refusal import Reason, Refusal

_CHUNK: Final = 1 << 20


def write(target: Path, data: bytes) -> None:
    """Writes the client's bytes to a new file and flushes it to the disk. Raises OSError."""
    with target.open("xb") as file:
        file.write(data)
        flush_file(file)


def copy(root: Path, relative: str, target: Path, max_bytes: int, field: str) -> None:
    """Copies the file `relative` below `root`; a link in a folder may lead to another file there.

    Raises Refusal(FIELD_INVALID) if it is missing, not a regular file or too large, and OSError if
    the copy cannot be written.
    """
    parent, _, name = relative.rpartition("/")
    if name in ("", ".", "..") or "\0" in relative or relative.startswith("/"):
        text = "must be relative to the import root, in plain form, and stay below it"
        raise Refusal(Reason.FIELD_INVALID, text, field=field)
    try:
        with (
            open_below(root, parent) if parent else open_root(root) as folder,
            folder.open(name, max_bytes) as source,
            target.open("xb") as file,
        ):
            for offset in range(0, source.size, _CHUNK):
                file.write(source.read(offset, min(_CHUNK, source.size - offset)))
            flush_file(file)
    except Refusal as error:
        if error.reason is Reason.STORE_UNAVAILABLE:
            raise Refusal(error.reason, error.message) from error
        raise Refusal(Reason.FIELD_INVALID, error.message, field=field) from error


def from_os_error(error: OSError) -> Refusal:
    """Returns the refusal for a failure of the disk that holds the jobs."""
    if is_disk_full(error):
        return Refusal(Reason.STORE_FULL, "the disk of the training jobs is full")
    return Refusal(Reason.STORE_UNAVAILABLE, "the directory of training jobs cannot be written")
