"""Opens files of untrusted origin: regular files only, without following links, below a root."""

from __future__ import annotations

import os
import stat
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Self

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.strict_json import shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 << 10

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files whose readers execute code from the file. Such files are never opened."""

_MAX_PATH = 4096
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO that was swapped in after the check would block.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class _Opened:
    """Owner of an open file descriptor; a context manager."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @property
    def descriptor(self) -> int:
        """The descriptor, which must not be closed yet."""
        assert self._descriptor is not None, "closed already"
        return self._descriptor

    def close(self) -> None:
        """Closes the descriptor. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RegularFile(_Opened):
    """An open regular file, read by position; a context manager.

    Attributes:
        name: name of the file, for messages.
        size: size in bytes when the file was opened.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor)
        self.name = name
        self.size = os.fstat(descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes from `offset`.

        Raises Refusal(ADAPTER_INVALID) if the file is too short or unreadable.
        """
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[filled:]], offset + filled)
            except OSError:
                raise _unreadable(self.name) from None
            if count == 0:
                message = f"{self.name} became shorter while it was read"
                raise Refusal(Reason.ADAPTER_INVALID, message, self.name)
            filled += count

    def read(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes from `offset`; raises as `read_into` does."""
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)


class Directory(_Opened):
    """An open directory whose files are opened through its descriptor; a context manager.

    Later renames or links do not change which directory that is.
    """

    def open(self, name: str, max_bytes: int) -> RegularFile:
        """Opens the regular file `name`, which must be a trusted name.

        Raises Refusal: ADAPTER_INVALID (missing, not a regular file, unreadable),
        ADAPTER_TOO_LARGE, and ADAPTER_UNSUPPORTED if the weights exist as a pickle only.
        """
        try:
            # Checked before it is opened, because opening some devices has effects.
            if not stat.S_ISREG(os.lstat(name, dir_fd=self.descriptor).st_mode):
                raise _irregular(name)
            descriptor = os.open(name, _FILE, dir_fd=self.descriptor)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError:
            raise _unreadable(name) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _irregular(name)
            if status.st_size > max_bytes:
                message = f"{name} has {status.st_size} bytes; at most {max_bytes} are accepted"
                raise Refusal(Reason.ADAPTER_TOO_LARGE, message, name)
            return RegularFile(descriptor, name)
        except BaseException:
            os.close(descriptor)
            raise

    def read_config(self) -> bytes:
        """Reads adapter_config.json; raises as `open` does."""
        with self.open(CONFIG_FILE, MAX_CONFIG_BYTES) as file:
            return file.read(0, file.size)

    def open_weights(self, max_bytes: int) -> RegularFile:
        """Opens adapter_model.safetensors; raises as `open` does."""
        return self.open(WEIGHTS_FILE, max_bytes)

    def names(self, most: int) -> list[str]:
        """Up to `most` names of files in the directory, sorted; [] if it cannot be read."""
        try:
            with os.scandir(self.descriptor) as entries:
                return sorted(entry.name for entry in islice(entries, most))
        except OSError:
            return []

    def _missing(self, name: str) -> Refusal:
        if name == WEIGHTS_FILE and (pickle := self._first_pickle()):
            return Refusal(
                Reason.ADAPTER_UNSUPPORTED,
                f"the weights are pickled ({shown(pickle)}); save them as {WEIGHTS_FILE} "
                "(PEFT: save_pretrained(..., safe_serialization=True))",
                shown(pickle),
            )
        return Refusal(Reason.ADAPTER_INVALID, f"there is no {name}", name)

    def _first_pickle(self) -> str | None:
        try:
            with os.scandir(self.descriptor) as entries:
                names = [e.name for e in islice(entries, 1000) if e.name.endswith(PICKLES)]
        except OSError:
            return None
        return min(names, key=lambda n: (not n.startswith("adapter_model"), n), default=None)


def open_directory(path: Path) -> Directory:
    """Opens a directory whose path the caller trusts; the last component must not be a link.

    Raises Refusal(FIELD_INVALID, field "path").
    """
    try:
        return Directory(os.open(path, _DIRECTORY))
    except (OSError, ValueError):
        raise _no_directory() from None


def opened(source: Path | Directory) -> AbstractContextManager[Directory]:
    """Context manager of `source` as a directory: opens and closes a path as `open_directory` does.

    A `Directory` belongs to the caller and stays open.
    """
    return nullcontext(source) if isinstance(source, Directory) else open_directory(source)


def open_below(root: Path, relative: str) -> Directory:
    """Opens the directory `relative` below `root` without following links.

    `root` itself is trusted and may be a link. Raises Refusal(FIELD_INVALID, field "path") if
    `relative` is absolute, leaves the root, is not in plain form ("a//b", "./a"), contains a NUL,
    passes through a link, or is not a directory.
    """
    parts = relative.removesuffix("/").split("/")
    if len(relative) > _MAX_PATH or "\0" in relative or any(p in ("", ".", "..") for p in parts):
        message = "path must be relative to the import root, in plain form, and stay below it"
        raise Refusal(Reason.FIELD_INVALID, message, "path")
    here = open_root(root)
    for part in parts:
        with here:
            try:
                below = os.open(part, _DIRECTORY, dir_fd=here.descriptor)
            except (OSError, ValueError):
                raise _no_directory() from None
        here = Directory(below)
    return here


def open_root(root: Path) -> Directory:
    """Opens `root` itself, which may be a link. Raises Refusal(STORE_UNAVAILABLE)."""
    try:
        return Directory(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        message = "the server's import root cannot be opened"
        raise Refusal(Reason.STORE_UNAVAILABLE, message, "path") from None


def _no_directory() -> Refusal:
    message = "there is no such directory, or its path contains a link"
    return Refusal(Reason.FIELD_INVALID, message, "path")


def _irregular(name: str) -> Refusal:
    return Refusal(Reason.ADAPTER_INVALID, f"{name} is not a regular file", name)


def _unreadable(name: str) -> Refusal:
    return Refusal(Reason.ADAPTER_INVALID, f"{name} cannot be read", name)
