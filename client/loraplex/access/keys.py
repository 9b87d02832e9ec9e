"""The key that every call carries, given as a text or read from a file."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from loraplex.errors import LoraplexError, invalid

MAX_KEY_BYTES = 8 << 10  # of a token; servers limit the size of all metadata together

_KEY = re.compile(r"[!-~]+")


class ClientKey:
    """A key or token. Neither `repr` nor an error shows it."""

    __slots__ = ("_file", "_text")

    def __init__(self, text: str, field: str, file: Path | None = None) -> None:
        """`field` is the option that the text came from. Raises InvalidRequest if it is no key."""
        self._text = _checked(text, field)
        self._file = file

    @classmethod
    def in_file(cls, path: str | os.PathLike[str]) -> ClientKey:
        """Reads the key in a file; `metadata` reads it again unless it is a pipe.

        Raises InvalidRequest if the file cannot be read or holds no key.
        """
        try:
            with open(path, "rb") as file:
                is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
                data = file.read(MAX_KEY_BYTES + 1)
        except OSError as error:
            raise invalid("key_file", f"{os.fspath(path)}: {error.strerror}") from None
        return cls(_decoded(data), "key_file", Path(path) if is_file else None)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of the next call.

        A file that cannot be read, or holds no key, leaves the last key in use.
        """
        if self._file is not None:
            try:
                data = _read_again(self._file)
                self._text = _checked(_decoded(data), "key_file")
            except (OSError, LoraplexError):
                pass
        return (("authorization", f"Bearer {self._text}"),)

    def __repr__(self) -> str:
        return "ClientKey(...)"


def _checked(text: str, field: str) -> str:
    """The key without white space around it. Raises InvalidRequest, which does not show it."""
    key = text.strip(" \t\r\n")
    if not key:
        raise invalid(field, "holds no key")
    if len(key) > MAX_KEY_BYTES:
        raise invalid(field, f"is longer than {MAX_KEY_BYTES} bytes, so it is no key")
    if not _KEY.fullmatch(key):
        raise invalid(field, "is no key: a key is one word of visible ASCII characters")
    return key


def _decoded(data: bytes) -> str:
    return data.decode("ascii", "replace")


def _read_again(path: Path) -> bytes:
    """The content of a regular file; waits for nobody, should the file be a pipe now."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        return file.read(MAX_KEY_BYTES + 1)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
