"""Copies of an adapter's two files whose digest is computed while they are copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO, Final, TypeAlias

from loraplex_model.base.durable import flush, flush_file
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.digest import AdapterDigest
from loraplex_adapters.format.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    RegularFile,
    open_directory,
)
from loraplex_adapters.store.backup.place import invalid

Errors: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes a context that turns OSError into a refusal."""

_PIECE: Final = 1 << 20
_NO_LIMIT: Final = 1 << 62
_OF_THE_SOURCE: Final = (
    Reason.ADAPTER_INVALID,
    Reason.ADAPTER_TOO_LARGE,
    Reason.ADAPTER_UNSUPPORTED,
    Reason.FIELD_INVALID,
)


def check(source: Path, digest: str) -> int:
    """Reads an adapter's files; returns their size.

    Raises Refusal(BACKUP_INVALID) if one is missing, no regular file, unreadable, or if their
    digest is not `digest`.
    """
    return _read(source, digest, lambda name, piece: None)


def copy(source: Path, digest: str, target: Path, mode: int, errors: Errors) -> int:
    """Copies an adapter's files to the new directory `target`; returns their size.

    On return they are on the disk. `mode` is that of the files; `errors` turns an OSError of
    writing into a refusal. Raises Refusal as `check` and `errors` do.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with ExitStack() as opened:
        files: dict[str, IO[bytes]] = {}

        def write(name: str, piece: memoryview) -> None:
            with errors():
                if name not in files:
                    made = os.open(target / name, flags, mode)
                    files[name] = opened.enter_context(open(made, "wb", buffering=0))
                reach("backup.copy.write")
                while piece:
                    piece = piece[files[name].write(piece) :]

        size = _read(source, digest, write)
        with errors():
            reach("backup.copy.sync")
            for file in files.values():
                flush_file(file)
            flush(target)
        return size


def _read(source: Path, digest: str, take: Callable[[str, memoryview], None]) -> int:
    try:
        with open_directory(source) as directory:
            config = directory.read_config()
            with directory.open(WEIGHTS_FILE, _NO_LIMIT) as file:
                actual = AdapterDigest(config, file.size)
                take(CONFIG_FILE, memoryview(config))
                for piece in _pieces(file):
                    actual.update(piece)
                    take(WEIGHTS_FILE, piece)
                size = len(config) + file.size
    except Refusal as error:
        if error.reason in _OF_THE_SOURCE:
            raise invalid(f"{digest}: {error.message}") from error
        raise
    if actual.text() != digest:
        raise invalid(f"{digest}: its content has changed")
    return size


def _pieces(file: RegularFile) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_PIECE, file.size)))
    for start in range(0, file.size, _PIECE):
        piece = buffer[: min(_PIECE, file.size - start)]
        file.read_into(piece, start)
        yield piece
