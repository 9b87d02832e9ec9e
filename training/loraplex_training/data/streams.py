"""Byte streams over a data file: its digest is computed as it is read, and sizes are bounded."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from typing import Any, BinaryIO, Final

GZIP: Final = b"\x1f\x8b"
BUFFER: Final = 1 << 18


class Unreadable(ValueError):
    """A file that cannot be read at all. The message completes the sentence "the file …"."""


class DigestStream(io.RawIOBase):
    """Computes the SHA-256 of everything that is read from a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._sha.update(data)
        buffer[: len(data)] = data
        return len(data)

    def digest(self) -> str:
        """Returns the SHA-256 (hex) of the whole file; reads what has not been read yet."""
        while self.read(BUFFER):
            pass
        return self._sha.hexdigest()


class BoundedStream(io.RawIOBase):
    """A stream of decompressed bytes that ends with an error at a limit."""

    def __init__(self, file: gzip.GzipFile, most: int) -> None:
        """`most` is the number of bytes that may be read."""
        self._file = file
        self._most = most
        self._left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises Unreadable: the limit is reached, or the compressed data is damaged."""
        try:
            data = self._file.read1(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            raise Unreadable(f"is a damaged gzip file ({error}); copy it again") from None
        self._left -= len(data)
        if self._left < 0:
            raise Unreadable(
                f"has more than {self._most:,} bytes when decompressed, the most that are "
                "possible: train on a part of it"
            )
        buffer[: len(data)] = data
        return len(data)


class _Joined(io.RawIOBase):
    """Bytes that were read already, then the rest of their stream."""

    def __init__(self, head: bytes, rest: io.RawIOBase) -> None:
        self._head = memoryview(head)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            return self._rest.readinto(buffer) or 0
        count = min(len(buffer), len(self._head))
        buffer[:count], self._head = self._head[:count], self._head[count:]
        return count


def decompressed(stream: BinaryIO, most: int) -> io.RawIOBase:
    """Returns the content of a gzip stream, at most `most` bytes of it."""
    return BoundedStream(gzip.GzipFile(fileobj=stream), most)


def with_head(raw: io.RawIOBase, size: int) -> tuple[bytes, io.BufferedReader]:
    """Returns the first `size` bytes of a stream, or all if it has fewer, and the whole stream."""
    parts: list[bytes] = []
    missing = size
    while missing and (part := raw.read(missing)):
        parts.append(part)
        missing -= len(part)
    head = b"".join(parts)
    return head, io.BufferedReader(_Joined(head, raw), BUFFER)
