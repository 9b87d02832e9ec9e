"""The header of a GGUF file: its metadata, and the places of its tensors.

It is parsed here because the reader of the `gguf` package takes more than ten seconds for a large
vocabulary. Every length in the file is checked against the bytes that are left before anything is
allocated, and no number of entries, tensors or elements is above a fixed limit.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""`struct` letters of the metadata types of fixed size."""

_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4

_LEAST_ENTRY = 8 + 4 + 1  # bytes: length of the key, type, a value of one byte
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes: length of the name, dimensions, type, offset
_MOST_ENTRIES = 1 << 16
_MOST_TENSORS = 1 << 18
_MOST_ELEMENTS = 1 << 24
_LONGEST_NAME = 1 << 8
_LONGEST_TEXT = 1 << 20
_LONGEST_LIST = 1 << 12


@dataclass(frozen=True, slots=True)
class LongValue:
    """Stands for a metadata value that is skipped: an array of strings or of more than 4,096
    numbers, or a string of more than 1 MiB.

    Attributes:
        length: number of elements, or of bytes of the string.
    """

    length: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Place of a tensor: shape as in torch, ggml type, first byte in the file, size in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """One mapped file, with its metadata and the places of its tensors."""

    path: Path
    data: mmap.mmap
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def shown(value: Any) -> str:
    """A metadata value for a message: one line of at most 60 characters."""
    if isinstance(value, LongValue):
        return f"{value.length} values"
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_file(path: Path) -> GgufFile:
    """Maps a file and parses its header.

    Raises `Refusal`: MODEL_INVALID for a damaged file, MODEL_UNSUPPORTED for an unknown version or
    tensor type.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise model_invalid(f"{path} is empty") from error
    return GgufFile(path, data, *_HeaderReader(data, path).header())


class _HeaderReader:
    """Parses the header from its first byte to its last."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def header(self) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
        """The metadata and the table of tensors."""
        if self._data[:4] != b"GGUF":
            raise self._damaged("it does not start with GGUF")
        self._at = 4
        (version,) = self._unpack("<I")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if big in _VERSIONS else f"of GGUF version {version}"
            raise model_unsupported(
                f"{self._path} is {what}; only little-endian files of versions 2 and 3 are read"
            )
        tensors, entries = self._unpack("<QQ")
        left = len(self._data) - self._at
        if entries * _LEAST_ENTRY + tensors * _LEAST_TENSOR > left:
            raise self._damaged(
                f"it is too short for {entries} entries of metadata and {tensors} tensors"
            )
        self._limit("entries of metadata", entries, _MOST_ENTRIES)
        self._limit("tensors", tensors, _MOST_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"{key} occurs twice")
            metadata[key] = self._value(*self._unpack("<I"))
        return metadata, self._table(tensors, metadata.get("general.alignment", 32))

    def _table(self, count: int, alignment: Any) -> Mapping[str, GgufTensor]:
        if type(alignment) is not int or alignment <= 0:
            raise self._damaged(f"general.alignment is {shown(alignment)}")
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, place = self._tensor()
            if name in found:
                raise self._damaged(f"tensor {name} occurs twice")
            found[name] = place
        base = -(-self._at // alignment) * alignment
        return {name: self._place(name, base, *place) for name, place in found.items()}

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = self._name()
        (dimensions,) = self._unpack("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed(self._unpack(f"<{dimensions}Q")))  # ggml: fastest dimension first
        kind, offset = self._unpack("<IQ")
        return name, (shape, kind, offset)

    def _place(
        self, name: str, base: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError as error:
            raise model_unsupported(
                f"{self._path} holds {name} in ggml's type {kind}, which is not supported"
            ) from error
        total = prod(shape) // weights * size
        if base + offset + total > len(self._data):
            raise self._damaged(f"{name} exceeds the file; the download may be incomplete")
        return GgufTensor(shape, kind, base + offset, total)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._unpack("<" + _SCALARS[kind])[0]
        if kind != _ARRAY:
            raise self._damaged(f"metadata of type {kind}")
        element, count = self._unpack("<IQ")
        self._limit("elements of an array", count, _MOST_ELEMENTS)
        if element in _SCALARS:
            layout = f"<{count}{_SCALARS[element]}"
            if count <= _LONGEST_LIST:
                return list(self._unpack(layout))
            self._skip(struct.calcsize(layout))
            return LongValue(count)
        if element != _STRING:
            raise self._damaged(f"an array of type {element}")
        for _ in range(count):
            self._skip(*self._unpack("<Q"))
        return LongValue(count)

    def _text(self) -> str | LongValue:
        (length,) = self._unpack("<Q")
        start = self._at
        self._skip(length)
        if length > _LONGEST_TEXT:
            return LongValue(length)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _name(self) -> str:
        (length,) = self._unpack("<Q")
        if length > _LONGEST_NAME:
            raise self._damaged(f"a name has {length} bytes")
        start = self._at
        self._skip(length)
        name = self._data[start : self._at].decode("utf-8", "replace")
        if not name.isprintable():
            raise self._damaged("a name has characters that cannot be printed")
        return name

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        start = self._at
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def _skip(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise self._damaged("it ends within its header")
        self._at += length

    def _limit(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise self._damaged(f"it has {count} {what}; {most} are allowed")

    def _damaged(self, what: str) -> Refusal:
        return model_invalid(f"{self._path} is not a whole GGUF file: {what}")
