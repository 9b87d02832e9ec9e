"""Recognises what a data file is, by its first bytes and its name.

A file that is not read is refused once, with what it is and how to make a readable file of it.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Mapping, Set
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import Final

from loraplex_adapters.format.strict_json import decode_from, shown

from loraplex_training.data.streams import GZIP, Unreadable

HEAD: Final = 1 << 20
"""Bytes of a file that are looked at."""


class FileKind(StrEnum):
    """Kinds of files that are read."""

    LINES = "JSONL"
    ARRAY = "JSON array"
    OBJECTS = "JSON objects"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "Parquet"


_AS_LINES: Final = 'df.to_json("data.jsonl", orient="records", lines=True)'
_ARROW: Final = (
    "an Arrow file; write it as Parquet or JSON lines, with to_parquet or to_json of datasets"
)
_PICKLE: Final = f"a Python pickle, which may run code and is never opened; use {_AS_LINES}"
_COMPRESSED: Final = "compressed with {0}; decompress it first: {1}"

_MAGIC: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, GZIP, "compressed with gzip twice; decompress it once: gunzip -k"),
    (0, b"\x28\xb5\x2f\xfd", _COMPRESSED.format("Zstandard", "zstd -d")),
    (0, b"\xfd7zXZ\0", _COMPRESSED.format("xz", "xz -dk")),
    (0, b"BZh", _COMPRESSED.format("bzip2", "bunzip2 -k")),
    (0, b"\x04\x22\x4d\x18", _COMPRESSED.format("LZ4", "lz4 -d")),
    (0, b"\xff\x06\0\0sNaPpY", _COMPRESSED.format("Snappy", "snzip -d")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it and name the file that is in it"),
    (0, b"Rar!\x1a\x07", "a RAR archive; unpack it and name the file that is in it"),
    (257, b"ustar", "a tar archive; unpack it (tar -xf) and name the file that is in it"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office file; save the table as CSV (UTF-8)"),
    (
        0,
        b"SQLite format 3\0",
        f"an SQLite database; read the table with pandas and use {_AS_LINES}",
    ),
    (0, b"ARROW1", _ARROW),
    (0, b"\xff\xff\xff\xff", _ARROW),
    (0, b"FEA1", f"a Feather file; read it with pandas and use {_AS_LINES}"),
    (0, b"PARE", "an encrypted Parquet file; write it without encryption"),
    (0, b"ORC", f"an ORC file; read it with pandas and use {_AS_LINES}"),
    (0, b"Obj\x01", "an Avro file; convert it to JSON lines: avro-tools tojson"),
    (0, b"\x89HDF\r\n", f"an HDF5 file; read it with pandas and use {_AS_LINES}"),
    (0, b"\x93NUMPY", "an array of NumPy; write the examples as JSON lines"),
    (0, b"\x80\x02", _PICKLE),
    (0, b"\x80\x03", _PICKLE),
    (0, b"\x80\x04", _PICKLE),
    (0, b"\x80\x05", _PICKLE),
    (0, b"GGUF", "a GGUF model, not data; it belongs to --model"),
    (0, b"%PDF", "a PDF document; write its text as JSON lines"),
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer, not the data itself; fetch it: git lfs pull",
    ),
)
"""Offset and bytes of files that are not read, and what they are."""

_BOMS: Final = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_SPACE: Final = " \t\r\n"
"""White space of JSON."""
_LETTERS: Final = 64
"""Characters of a file that are shown in a message."""
_WRITE: Final = 'write each example as an object on its own line, such as {"text": "…"}'


def recognise(head: bytes, name: str, columns: Set[str]) -> FileKind:
    """Returns the kind of a file that begins with `head` (`HEAD` bytes, or all).

    `name` is that of the file, whose ending distinguishes tables. A table under another name is
    recognised by a header that has one of `columns`.

    Raises:
        Unreadable: with what the file is, if it is not read.
    """
    if head.startswith(b"PAR1"):
        return FileKind.PARQUET
    _refuse_binary(head)
    text = codecs.getincrementaldecoder("utf-8-sig")("replace").decode(head)
    start = text.lstrip(_SPACE)
    if start.startswith("["):
        return FileKind.ARRAY
    if start.startswith("{"):
        return _kind_of_objects(start, columns, whole=len(head) < HEAD)
    ending = Path(name.lower().removesuffix(".gz")).suffix
    if ending in (".tsv", ".tab"):
        return FileKind.TSV
    if ending == ".csv":
        return FileKind.CSV
    first = start.partition("\n")[0]
    delimiter = delimiter_of(first)
    header = cells(first, delimiter)
    if len(header) > 1 and not columns.isdisjoint(header):
        return FileKind.TSV if delimiter == "\t" else FileKind.CSV
    _refuse_text(start, whole=len(head) < HEAD)
    return FileKind.LINES


def delimiter_of(header: str) -> str:
    """Returns the delimiter, of comma, semicolon and tab, that gives a header the most cells."""
    return max(",;\t", key=lambda delimiter: len(cells(header, delimiter)))


def cells(line: str, delimiter: str) -> list[str]:
    """Returns the cells of one line of a table; none if it is no such line."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _refuse_binary(head: bytes) -> None:
    for offset, magic, what in _MAGIC:
        if head[offset:].startswith(magic):
            raise Unreadable(f"is {what}")
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            raise Unreadable(_not_utf8(encoding))
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"xl/" in head:
            raise Unreadable("is an Excel workbook; save the table as CSV (UTF-8)")
        raise Unreadable("is a ZIP archive; unpack it (unzip) and name the file that is in it")
    if head[5:9] == b"\0\0\0{":
        raise Unreadable("is a safetensors file, which holds weights and no examples")
    start = head[:1024]
    if len(start) > 3 and b"\0" in start:
        pairs = (start[0::2], start[1::2])
        if any(half.count(0) > len(half) * 0.8 for half in pairs) and not all(map(any, pairs)):
            raise Unreadable(_not_utf8("UTF-16"))
        raise Unreadable("is binary data, not text; name a file of JSON lines, CSV or Parquet")


def _not_utf8(encoding: str) -> str:
    return f"is text in {encoding}; convert it to UTF-8: iconv -f {encoding} -t UTF-8"


def _kind_of_objects(text: str, columns: Set[str], whole: bool) -> FileKind:
    """Returns the kind of a file that begins with an object; `whole`: `text` is all of it."""
    try:
        value, end = decode_from(text, 0)
    except ValueError:
        key = _list_key(text)
        if not whole and key and key not in columns:
            raise Unreadable(_wrapped(key)) from None
        first, _, rest = text.partition("\n")
        if first.strip() == "{" and not _is_object(rest.lstrip().partition("\n")[0]):
            return FileKind.OBJECTS  # over several lines, and damaged
        _refuse_text(text, whole)
        return FileKind.LINES
    assert isinstance(value, dict), "it begins with a brace"
    rest = text[end:]
    if whole and not rest.strip():
        _refuse_object(value, columns)
    if "\n" in text[:end]:
        return FileKind.OBJECTS
    second = rest.partition("\n")[2].lstrip().partition("\n")[0]
    if rest.lstrip(" \t\r").startswith("{") and not _is_object(second):
        return FileKind.OBJECTS  # without line ends between them
    _refuse_text(text, whole)
    return FileKind.LINES


def _list_key(text: str) -> str:
    """Returns the first key of an object if its value is a list of examples, else ""."""
    try:
        key, end = decode_from(text, text.index('"'))
        item, _ = decode_from(text, text.index("{", end))
    except ValueError:
        return ""
    between = text[end : text.index("{", end)].split()
    return str(key) if "".join(between) == ":[" and _is_example(item) else ""


def _is_example(item: object) -> bool:
    """Whether an element of a list can be an example, and is not a message of one."""
    return isinstance(item, dict) and item.keys().isdisjoint(("role", "from"))


def _refuse_object(value: Mapping[str, object], columns: Set[str]) -> None:
    """Raises Unreadable if the only object of a file is a whole data set."""
    lists = {key: one for key, one in value.items() if isinstance(one, list) and one}
    for key, one in lists.items() if columns.isdisjoint(value) else ():
        if all(map(_is_example, one)):
            raise Unreadable(_wrapped(key))
    by_row = all(isinstance(one, dict) and "0" in one for one in value.values())
    by_column = len({len(one) for one in lists.values()}) == 1 and not any(
        isinstance(one, dict | list) for one in chain(*lists.values())
    )
    if value and (by_row or (len(lists) == len(value) and by_column)):
        raise Unreadable(
            f"is one JSON object that holds columns, not examples; write it with {_AS_LINES}"
        )


def _wrapped(key: str) -> str:
    name = shown(key, 40)
    return (
        f'is one JSON object with a list under "{name}"; write the list alone: '
        f"jq -c '.[\"{name}\"][]' FILE > data.jsonl"
    )


def _refuse_text(text: str, whole: bool) -> None:
    """Raises Unreadable if neither the first nor the second line of text is a JSON object.

    If only one is none, the file has JSON lines with a bad line.
    """
    complete = text.split("\n")[: None if whole else -1]
    lines = list(islice((line.strip() for line in complete if line.strip()), 2))
    if len(lines) < 2 or any(map(_is_object, lines)):
        return
    first = lines[0]
    if first.lower().startswith(("<!doctype html", "<html")):
        what = "an HTML page, perhaps that of a login or an error; download the file itself"
    elif first.startswith(("{'", '{"')) and all(line.endswith("},") for line in lines):
        what = "JSON objects with a comma after each line; remove the commas: sed 's/,$//'"
    elif first.startswith("{'"):
        what = "written as Python shows dictionaries, which is not JSON; use json.dumps"
    elif first.startswith("{"):
        return
    elif first.startswith("<"):
        what = f"XML, not JSON lines; {_WRITE}"
    elif first.startswith(("---", "- ")):
        what = f"YAML or Markdown, not JSON lines; {_WRITE}"
    else:
        what = f'text, not JSON lines (it begins with "{shown(first, _LETTERS)}"); {_WRITE}'
    raise Unreadable(f"is {what}")


def _is_object(line: str) -> bool:
    # The strict reader of lines reports the details, such as two equal keys.
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
