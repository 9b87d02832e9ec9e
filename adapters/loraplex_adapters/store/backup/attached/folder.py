"""Folders that a backup takes along, as values: where their bytes are, and how a backup lists them.

<backup>/attached/sha256/<hex>    the bytes of a file, by their SHA-256
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

HEX: Final = re.compile(r"\A[0-9a-f]{64}\Z")

_NAME: Final = re.compile(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class AttachedFile:
    """A file to back up.

    Attributes:
        source: its bytes, or the path of a file that never changes.
        sha256: the SHA-256 that the bytes of a path must have, as 64 hex digits.
    """

    source: bytes | Path
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class AttachedFolder:
    """A folder to back up.

    Attributes:
        name: its path below the root of all folders: one name, or two with a slash between them.
        files: its files by their names; None if the folder is damaged.
    """

    name: str
    files: Mapping[str, AttachedFile] | None


class Attachments(Protocol):
    """The folders that a backup takes along. Methods may raise OSError."""

    def exists(self) -> bool:
        """Whether the root of the folders is there."""

    def folders(self) -> Iterable[AttachedFolder]:
        """The folders, as they are now."""


Listed: TypeAlias = Mapping[str, Mapping[str, tuple[str, int]]]
"""The folders of a backup: SHA-256 and size in bytes of each file, by folder and name."""


def object_in(place: Path, sha256: str) -> Path:
    """Where a backup has the bytes with this SHA-256."""
    return place / "attached" / "sha256" / sha256


def is_folder_name(name: str) -> bool:
    """Whether a text may be the name of a folder: it stays below the root."""
    parts = name.split("/")
    return len(parts) <= 2 and all(map(_NAME.match, parts))


def listed_of(found: Any) -> Listed:
    """The folders that a manifest lists. Raises ValueError, TypeError or AttributeError."""
    listed = {}
    for folder, files in found.items():
        entries = {name: (str(sha256), int(size)) for name, (sha256, size) in files.items()}
        sound = all(HEX.match(sha256) and size >= 0 for sha256, size in entries.values())
        if not (sound and is_folder_name(folder) and all(map(_NAME.match, entries))):
            raise ValueError(folder)
        listed[folder] = entries
    if any(name.partition("/")[0] in listed for name in listed if "/" in name):
        raise ValueError("a folder lies in another")
    return listed


def sizes_of(listed: Listed) -> dict[str, int]:
    """The size of each different content, by its SHA-256."""
    return dict(entry for files in listed.values() for entry in files.values())


def has_object(place: Path, sha256: str, size: int | None) -> bool:
    """Whether a backup has a content, as far as its size tells. Raises OSError."""
    try:
        status = object_in(place, sha256).lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def open_regular(path: Path) -> int:
    """A descriptor of a regular file that is no link. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path.name} is not a regular file")
