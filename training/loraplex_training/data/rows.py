"""Rows of data files: JSON lines, lists of objects, CSV and Parquet, one value after the other."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any, BinaryIO, Final

from loraplex_adapters.format.strict_json import decode_from, loads, shown

from loraplex_training.data.recognise import FileKind, delimiter_of
from loraplex_training.data.streams import Unreadable

NOT_UTF8: Final = "is not UTF-8; convert it, for example with iconv -f WINDOWS-1252 -t UTF-8"
_PARQUET_BYTES: Final = 1 << 30
_PARQUET_ROWS: Final = 1024
"""Limits of the rows of a Parquet file that are decoded at once."""


class Blank(Enum):
    """The value of a line without content."""

    BLANK = "blank"


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row of a file.

    Attributes:
        number: the line of JSON lines, the element of a list, the row of a table, from 1. The
            header of CSV is row 1.
        value: a JSON value, or BLANK.
        problem: why the row cannot be read, or "". Completes the sentence "this line …".
    """

    number: int
    value: object = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Bytes of a file, decompressed, and of one row."""

    file: int
    row: int


def rows(kind: FileKind, stream: io.BufferedReader, limits: SizeLimits) -> Iterator[FileRow]:
    """Yields the rows of a file. Raises Unreadable."""
    return _READERS[kind](stream, limits)


def _json_lines(stream: BinaryIO, limits: SizeLimits) -> Iterator[FileRow]:
    foreign = last = 0
    for number, line in enumerate(_lines(stream, limits.row), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            yield FileRow(number, Blank.BLANK)
            continue
        try:
            yield FileRow(number, _line_value(line, limits))
        except UnicodeDecodeError:
            # All lines of a file in another encoding are at fault for one reason: name it once.
            foreign, last = foreign + 1, number
            if foreign == 1:
                yield FileRow(number, problem=NOT_UTF8)
        except ValueError as error:
            yield FileRow(number, problem=str(error))
    if foreign > 1:
        yield FileRow(last, problem=f"is the last of {foreign:,} lines that are not UTF-8")


def _line_value(line: bytes, limits: SizeLimits) -> object:
    if len(line) > limits.row:
        raise ValueError(f"is longer than {limits.row:,} bytes")
    line.decode()
    if line.lstrip().startswith(b"["):
        raise ValueError("is a JSON list; write one object on each line")
    return loads(line)


def _lines(file: BinaryIO, most: int) -> Iterator[bytes]:
    """Yields lines without their ends; of one that is too long, only its beginning."""
    while line := file.readline(most + 2):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(most)):
            pass
        yield line.removesuffix(b"\n").removesuffix(b"\r")


class _JsonText:
    """The text of a JSON file, of which a window is in memory: at least one longest row."""

    def __init__(self, stream: BinaryIO, row: int) -> None:
        self._text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        self._row = row
        self._held, self._at, self._ended = "", 0, False

    def next(self) -> str:
        """Skips white space; returns the character after it, or "" at the end."""
        while True:
            while self._at < len(self._held) and self._held[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._held) or self._ended:
                return self._held[self._at : self._at + 1]
            self._fill()

    def skip(self) -> None:
        """Goes past one character."""
        self._at += 1

    def value(self, number: int) -> FileRow:
        """Reads the value that follows. Raises Unreadable."""
        self.next()
        while len(self._held) - self._at <= self._row and not self._ended:
            self._fill()
        try:
            value, end = decode_from(self._held, self._at)
        except ValueError as error:
            cut = "" if self._ended else f", or is longer than {self._row:,} characters"
            raise Unreadable(f"cannot be read: example {number} {error}{cut}") from None
        size, self._at = end - self._at, end
        long = size > self._row
        return FileRow(number, value, f"is longer than {self._row:,} characters" if long else "")

    def _fill(self) -> None:
        try:
            more = self._text.read(2 * self._row)
        except UnicodeDecodeError:
            raise Unreadable(NOT_UTF8) from None
        self._held, self._at = self._held[self._at :] + more, 0
        self._ended = not more


def _json_array(stream: BinaryIO, limits: SizeLimits) -> Iterator[FileRow]:
    text, number = _JsonText(stream, limits.row), 0
    text.next()
    text.skip()
    if text.next() == "]":
        raise Unreadable("is an empty JSON list; it should hold examples")
    while True:
        number += 1
        row = text.value(number)
        if number == 1 and not isinstance(row.value, dict):
            raise Unreadable("is a JSON list, but not of objects; each element is an example")
        yield row
        if (mark := text.next()) == "]":
            break
        if mark != ",":
            problem = "it is cut off" if not mark else "a comma or ] should follow"
            raise Unreadable(f"is a JSON list that is damaged after example {number}: {problem}")
        text.skip()
    text.skip()
    if text.next():
        raise Unreadable("goes on after the end of its JSON list; write one object on each line")


def _json_objects(stream: BinaryIO, limits: SizeLimits) -> Iterator[FileRow]:
    text, number = _JsonText(stream, limits.row), 0
    while mark := text.next():
        if number and mark == ",":
            raise Unreadable("has commas between its JSON objects; write them between [ and ]")
        number += 1
        yield text.value(number)


def _table(stream: BinaryIO, limits: SizeLimits, delimiter: str = "") -> Iterator[FileRow]:
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    lines = _text_lines(text, limits.row)
    first = next((line for line in lines if line.strip()), "")
    chosen = delimiter or delimiter_of(first.rstrip("\r\n"))
    before = csv.field_size_limit(limits.row)
    table = csv.reader(chain([first], lines), delimiter=chosen, strict=True)
    try:
        names = _header(next(table, []))
        for number, cells in enumerate(table, 2):
            yield _table_row(number, names, cells, limits)
    except csv.Error as error:
        raise Unreadable(
            f"is damaged CSV at line {table.line_num}: {error}; a cell with a quote, a delimiter "
            'or a line break stands in quotes, and a quote in it is written ""'
        ) from None
    finally:
        csv.field_size_limit(before)


def _text_lines(text: io.TextIOWrapper, most: int) -> Iterator[str]:
    number = 0
    try:
        while line := text.readline(most):
            number += 1
            if len(line) == most and not line.endswith("\n"):
                raise Unreadable(f"has a line ({number}) of more than {most:,} characters")
            yield line
    except UnicodeDecodeError:
        raise Unreadable(NOT_UTF8) from None


def _header(cells: list[str]) -> list[str]:
    """Returns the names of columns. Those that pandas writes for its index get a "_" before."""
    names = [
        f"_{at}" if not name else f"_{name}" if name.startswith("Unnamed: ") else name
        for at, name in enumerate(cells)
    ]
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise Unreadable(f'has two columns with the name "{shown(name)}"; rename one')
    return names


def _table_row(number: int, names: list[str], cells: list[str], limits: SizeLimits) -> FileRow:
    if not any(cells):
        return FileRow(number, Blank.BLANK)
    if len(cells) != len(names):
        text = f"has {len(cells)} cells, and the header names {len(names)} columns"
        return FileRow(number, problem=text)
    if sum(map(len, cells)) > limits.row:
        return FileRow(number, problem=f"is longer than {limits.row:,} characters")
    return FileRow(number, {name: cell or None for name, cell in zip(names, cells, strict=True)})


def _parquet(stream: BinaryIO, limits: SizeLimits) -> Iterator[FileRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Unreadable(
            "is a Parquet file, which needs pyarrow: pip install 'loraplex[data]'; or convert it "
            "to JSON lines"
        ) from None
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(stream.read()))
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        total = sum(group.total_byte_size for group in groups)
        if total > limits.file:
            raise Unreadable(_too_large(total, limits))
        # A value can be as large as its whole column if it is the same in all rows.
        largest = max((group.total_byte_size for group in groups), default=1)
        size = max(4, min(_PARQUET_ROWS, _PARQUET_BYTES // max(1, largest)))
        number = read = 0
        for batch in file.iter_batches(batch_size=size):
            held = batch.nbytes > size * limits.row
            for value in () if held else batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                row = _value_size(value)
                # The sizes in the file count a value once that many rows have.
                if (read := read + row) > limits.file:
                    raise Unreadable(_too_large(read, limits, f" up to row {number}"))
                long = row > limits.row
                problem = f"is longer than {limits.row:,} characters" if long else ""
                yield FileRow(number, value, problem)
            if held:
                raise Unreadable(f"has rows of more than {limits.row:,} bytes after row {number}")
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        text = shown(str(error).partition("\n")[0])
        raise Unreadable(f"is a damaged Parquet file: {text}; copy or write it again") from None


def _too_large(size: int, limits: SizeLimits, where: str = "") -> str:
    return (
        f"is a Parquet file with {size:,} bytes when decompressed{where}; at most "
        f"{limits.file:,} are possible: train on a part of it"
    )


def _value_size(value: object) -> int:
    """Characters of the texts of a value, keys included; anything else counts as eight."""
    size, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            size += sum(map(len, item))
            left += item.values()
        elif isinstance(item, list):
            left += item
        else:
            size += 8
    return size


_READERS: Final[Mapping[FileKind, Callable[[Any, SizeLimits], Iterator[FileRow]]]] = {
    FileKind.LINES: _json_lines,
    FileKind.ARRAY: _json_array,
    FileKind.OBJECTS: _json_objects,
    FileKind.CSV: _table,
    FileKind.TSV: lambda stream, limits: _table(stream, limits, "\t"),
    FileKind.PARQUET: _parquet,
}
