"""Opens files of untrusted origin: regular files only, below a root.

The kernel never follows a link. A hub's cache consists of links (`snapshots/REVISION/NAME` leads to
`../../blobs/DIGEST`), so where a link is in place of a file, the components of its target are
opened one after the other from the root. The file that is opened is therefore below the root.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Self

from loraplex_model.base.durable import is_shortage
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.foreign.folder import Cause, cause_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
"""Most bytes of a configuration. AdaLoRA's lists every singular value of every module, 13 bytes
each: 30 layers with 7 modules of rank 256 are 700 KB."""

_MAX_PATH = 4096
_MAX_LISTED = 1000
_MAX_LINKS = 8
_SNAPSHOTS = "snapshots"
_INSTEAD = (
    "import a copy without links (cp -rL FROM TO, or hf download --local-dir DIR), or send the "
    "files with `loraplex adapters upload`"
)
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

        Raises Refusal: ADAPTER_INVALID (too short, unreadable), STORE_UNAVAILABLE (no memory).
        """
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[filled:]], offset + filled)
            except OSError as error:
                raise _unreadable(self.name, error) from None
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

    Later renames or links do not change which directory that is. `within` is the root that links to
    files may not leave, which the directory then owns, and its path below it; without it no link is
    followed.
    """

    def __init__(self, descriptor: int, within: tuple[Directory, tuple[str, ...]] | None = None):
        super().__init__(descriptor)
        self._within = within

    def close(self) -> None:
        """Closes the directory, and the root. Idempotent."""
        super().close()
        if self._within is not None:
            self._within[0].close()

    def open(self, name: str, max_bytes: int) -> RegularFile:
        """Opens the regular file `name`, which must be a trusted name.

        Raises Refusal: ADAPTER_INVALID (missing, not a regular file, unreadable),
        ADAPTER_TOO_LARGE, ADAPTER_UNSUPPORTED if the weights exist as a pickle only, and
        STORE_UNAVAILABLE if no file descriptor is free.
        """
        try:
            # Checked before it is opened, because opening some devices has effects.
            mode = os.lstat(name, dir_fd=self.descriptor).st_mode
            if stat.S_ISLNK(mode):
                descriptor = self._linked(name)
            elif not stat.S_ISREG(mode):
                raise _irregular(name)
            else:
                descriptor = os.open(name, _FILE, dir_fd=self.descriptor)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise _unreadable(name, error) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _irregular(name)
            if status.st_size > max_bytes:
                message = f"{name} has {status.st_size} bytes; at most {max_bytes} are accepted"
                if name == WEIGHTS_FILE:
                    message += "; a server's limit is its setting max_adapter_file"
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

    def _linked(self, name: str) -> int:
        """Opens the file that the link `name` leads to, below the root, and returns a descriptor.

        Raises Refusal(ADAPTER_INVALID) if it leads elsewhere; OSError as `os.open` does.
        """
        if self._within is None:
            raise _link(name, "and no links are followed here")
        root, above = self._within
        here, ahead, links = list(above), [name], 0
        while ahead:
            part = ahead.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                if not here:
                    raise _link(name, "that leaves the folder it may lead to")
                here.pop()
                continue
            try:
                with _walk(root, here) as folder:
                    mode = os.lstat(part, dir_fd=folder.descriptor).st_mode
                    if stat.S_ISREG(mode) and not ahead:
                        return os.open(part, _FILE, dir_fd=folder.descriptor)
                    if stat.S_ISLNK(mode):
                        ahead = os.readlink(part, dir_fd=folder.descriptor).split("/") + ahead
            except FileNotFoundError:
                raise _link(name, "to nothing") from None
            if stat.S_ISLNK(mode):
                links += 1
                if links > _MAX_LINKS or sum(map(len, ahead)) > _MAX_PATH:
                    raise _link(name, f"that leads through more than {_MAX_LINKS} links")
                if ahead[0] == "" and len(ahead) > 1:
                    raise _link(name, "to an absolute path")
            elif stat.S_ISDIR(mode):
                here.append(part)
            else:
                break
        raise _link(name, "to something that is not a regular file")

    def names(self, most: int) -> list[str]:
        """Up to `most` names in the directory, sorted; [] if it cannot be read."""
        try:
            with os.scandir(self.descriptor) as entries:
                return sorted(entry.name for entry in islice(entries, most))
        except OSError:
            return []

    def _missing(self, name: str) -> Refusal:
        if name in (CONFIG_FILE, WEIGHTS_FILE) and (cause := cause_of(self.listing)) is not None:
            return refused(cause)
        return Refusal(Reason.ADAPTER_INVALID, f"there is no {name}", name)

    def listing(self, below: str = "") -> list[tuple[str, bool]]:
        """The names in a folder `below`, and which of them are folders; none if unreadable.

        Links are listed as files and not followed. At most 1000 names are read.
        """
        parts = ["."] if not below else below.split("/")
        try:
            with _walk(self, parts) as folder, os.scandir(folder.descriptor) as entries:
                named = islice(entries, _MAX_LISTED)
                return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in named]
        except OSError:
            return []


def refused(cause: Cause) -> Refusal:
    """The refusal for a cause that was found in a folder or in a file's first bytes."""
    reason, message, field = cause
    return Refusal(Reason(reason), message, field)


def open_directory(path: Path) -> Directory:
    """Opens a directory whose path the caller trusts; the last component must not be a link.

    Raises Refusal: FIELD_INVALID (field "path"), STORE_UNAVAILABLE (no descriptor is free).
    """
    try:
        return Directory(os.open(path, _DIRECTORY))
    except (OSError, ValueError) as error:
        raise _no_directory(error) from None


def opened(source: Path | Directory) -> AbstractContextManager[Directory]:
    """Context manager of `source` as a directory: opens and closes a path as `open_directory` does.

    Its links may lead to files within the directory, and from a snapshot of a hub's cache to the
    files of the same repository. A `Directory` belongs to the caller and stays open.
    """
    if isinstance(source, Directory):
        return nullcontext(source)
    path = Path(os.path.abspath(source))
    is_snapshot = path.parent.name == _SNAPSHOTS
    above = path.parts[-2:] if is_snapshot else ()
    with open_directory(source) as directory:
        try:
            root = _root(path.parent.parent) if is_snapshot else _again(directory)
            try:
                return Directory(os.dup(directory.descriptor), (root, above))
            except OSError:
                root.close()
                raise
        except OSError as error:
            raise _no_directory(error) from None


def open_below(root: Path, relative: str) -> Directory:
    """Opens the directory `relative` below `root` without following links.

    A link in place of a file may then lead to another file below `root`.

    `root` itself is trusted and may be a link. Raises Refusal(FIELD_INVALID, field "path") if
    `relative` is absolute, leaves the root, is not in plain form ("a//b", "./a"), contains a NUL,
    passes through a link, or is not a directory.
    """
    parts = relative.removesuffix("/").split("/")
    if len(relative) > _MAX_PATH or "\0" in relative or any(p in ("", ".", "..") for p in parts):
        message = "path must be relative to the import root, in plain form, and stay below it"
        raise Refusal(Reason.FIELD_INVALID, message, "path")
    top = open_root(root)
    try:
        with _walk(top, parts) as folder:
            return Directory(os.dup(folder.descriptor), (top, tuple(parts)))
    except (OSError, ValueError) as error:
        top.close()
        raise _no_directory(error) from None


def open_root(root: Path) -> Directory:
    """Opens `root` itself, which may be a link. Raises Refusal(STORE_UNAVAILABLE)."""
    try:
        return _root(root)
    except OSError:
        message = "the server's import root cannot be opened"
        raise Refusal(Reason.STORE_UNAVAILABLE, message, "path") from None


def _walk(root: Directory, parts: Sequence[str]) -> Directory:
    """Opens the directory at `parts` below `root`, none of which may be a link. Raises OSError."""
    here = _again(root)
    for part in parts:
        with here:
            below = os.open(part, _DIRECTORY, dir_fd=here.descriptor)
        here = Directory(below)
    return here


def _root(root: Path) -> Directory:
    """Opens a directory, or the one that a link leads to. Raises OSError."""
    return Directory(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _again(directory: Directory) -> Directory:
    return Directory(os.dup(directory.descriptor))


def _no_directory(error: Exception) -> Refusal:
    if is_shortage(error):
        return _shortage("a directory")
    message = "there is no such directory, or its path contains a link"
    return Refusal(Reason.FIELD_INVALID, message, "path")


def _irregular(name: str) -> Refusal:
    return Refusal(Reason.ADAPTER_INVALID, f"{name} is not a regular file", name)


def _link(name: str, problem: str) -> Refusal:
    message = f"{name} is a symbolic link {problem}; {_INSTEAD}"
    return Refusal(Reason.ADAPTER_INVALID, message, name)


def _unreadable(name: str, error: OSError) -> Refusal:
    if is_shortage(error):
        return _shortage(name)
    return Refusal(Reason.ADAPTER_INVALID, f"{name} cannot be read", name)


def _shortage(what: str) -> Refusal:
    message = f"{what} cannot be opened now: the process has no free file descriptors or memory"
    return Refusal(Reason.STORE_UNAVAILABLE, message)
