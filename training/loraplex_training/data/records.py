"""Reads a data file as examples, strictly: nothing unknown is guessed at.

The file is JSON lines, a JSON list, CSV, TSV or Parquet, gzipped or not (`recognise`). Each row of
it is an object of one of the shapes that `shapes` describes; a file may mix them. A key whose value
is null, and an empty cell of a table, is an absent key. Lines without content are skipped and
counted. A byte order mark at the start of the file and CRLF line ends are accepted.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from loraplex_adapters.format.strict_json import shown
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.data.prepare import FREE, RowNames, with_nested, without_nulls
from loraplex_training.data.problems import Dropped, Problems
from loraplex_training.data.recognise import HEAD, FileKind, recognise
from loraplex_training.data.rows import Blank, FileRow, SizeLimits, rows
from loraplex_training.data.shapes import KEYS, WANTED, DataRecord, kind_of, read_record
from loraplex_training.data.streams import (
    GZIP,
    DigestStream,
    Unreadable,
    decompressed,
    with_head,
)

MAX_LINE: Final = 1 << 20
"""Bytes of a line, or characters of an element or a row."""
MAX_FILE: Final = 512 << 20
"""Bytes of a file, decompressed. The tokens of a whole data set are in memory, 16 bytes each."""
MAX_KEYS: Final = 1000
"""Number of different keys that are remembered for messages."""


class RecordFile:
    """A data file, to be read once.

    Attributes:
        digest: SHA-256 (hex) of the file's bytes once it has been read, else "".
        kind: what the file is once it has been read, such as "JSONL" or "Parquet, gzipped".
        rows: number of rows that were read, those that are refused or dropped included.
        blank: number of lines and rows without content.
        keys: the first keys of the rows as they are in the file, and all that `names` names, with
            the number of times.
        ignored: keys that were ignored, with the number of times.
    """

    def __init__(
        self,
        path: Path,
        problems: Problems,
        field: str = "data",
        names: RowNames | None = None,
        shape: str = "",
    ) -> None:
        """Bad and dropped lines are added to `problems`; `field` is the option that names the file.

        `shape` is that of all rows; "" determines it from the keys of each.
        """
        self.field = field
        self.path = path
        self.digest = ""
        self.kind = ""
        self.rows = 0
        self.blank = 0
        self.keys: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self._problems = problems
        self._names = names or RowNames()
        self._named = frozenset(self._names.columns.values())
        self._shape = shape

    def __iter__(self) -> Iterator[DataRecord]:
        """Yields the valid examples.

        Raises Refusal(DATA_INVALID) if the file is missing, empty, too large or of a kind that is
        not read.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise Unreadable(f"is not a file; {_instead(self.path)}")
            size = self.path.stat().st_size
            if size > MAX_FILE:
                raise Unreadable(
                    f"has {size:,} bytes; at most {MAX_FILE:,} are possible: train on a part of it"
                )
            with self.path.open("rb") as file:
                yield from self._records(file)
        except Unreadable as error:
            raise self._refusal(str(error)) from None
        except OSError as error:
            raise self._refusal(f"cannot be read: {error.strerror or error}") from error

    def _records(self, file: BinaryIO) -> Iterator[DataRecord]:
        whole = DigestStream(file)
        kind, stream = self._open(whole)
        good = False
        free = () if kind is FileKind.PARQUET else FREE
        for row in rows(kind, stream, SizeLimits(MAX_FILE, MAX_LINE)):
            if row.value is Blank.BLANK:
                self.blank += 1
                continue
            self.rows += 1
            try:
                record = self._record(row, free)
            except Dropped as error:
                self._problems.drop(self.path, row.number, error, self.field)
            except ValueError as error:
                self._problems.add(self.path, row.number, str(error), self.field)
            else:
                good = True
                yield record
        self.digest = whole.digest()
        self._check(good)

    def _open(self, whole: DigestStream) -> tuple[FileKind, io.BufferedReader]:
        """Recognises the file, and decompresses it if it is gzipped. Raises Unreadable."""
        head, stream = with_head(whole, HEAD)
        gzipped = head.startswith(GZIP)
        if gzipped:
            head, stream = with_head(decompressed(stream, MAX_FILE), HEAD)
        try:
            kind = recognise(head, self.path.name, KEYS | self._named)
        except Unreadable as error:
            raise Unreadable(f"{error} (inside gzip)" if gzipped else str(error)) from None
        self.kind = f"{kind}, gzipped" if gzipped else str(kind)
        return kind, stream

    def _record(self, row: FileRow, free: frozenset[str] | tuple[()]) -> DataRecord:
        """Returns the example of a row. Raises ValueError with the reason why it cannot be used."""
        if row.problem:
            raise ValueError(row.problem)
        if not isinstance(row.value, dict):
            raise ValueError(f"is {kind_of(row.value)}, not an object; each is one of {WANTED}")
        for key in row.value:
            if len(self.keys) < MAX_KEYS or key in self._named:
                self.keys[key] += 1
        removed: list[str] = []
        value = without_nulls(self._names.renamed(row.value), free, removed)
        if self._is_table:
            value = with_nested(value, removed)
        value = self._names.with_roles(value)
        try:
            return read_record(
                value, row.number, self.ignored, self._shape, self._names.columns.keys()
            )
        except ValueError as error:
            named = [path for path in removed if _names(str(error), path)]
            if KEYS.isdisjoint(value):
                named = named or [path for path in removed if path in KEYS]
            if not named:
                raise
            absent = ", ".join(f'"{shown(path)}"' for path in named[:8])
            what = "an empty cell" if self._is_table else "null"
            # The file has the key, so the shape is known: only this line lacks a value.
            cause = error.cause if isinstance(error, Dropped) else str(error)
            raise Dropped(cause, f"{what} counts as absent: {absent}") from None

    def _check(self, good: bool) -> None:
        """Raises Unreadable if the file holds no example at all for one reason."""
        if not self.rows:
            what = "has only blank lines" if self.blank else "is empty"
            raise Unreadable(f"{what}; each line is an example, such as {WANTED}")
        names = {self._names.columns.get(key, key) for key in KEYS}
        if good or self._shape or not self.keys or not names.isdisjoint(self.keys):
            return
        keys = ", ".join(f'"{shown(key, 40)}"' for key in list(self.keys)[:12])
        what = "columns" if self._is_table else "keys"
        raise Unreadable(
            f"has no key of an example, but the {what} {keys}; name what they are, as in "
            f"--columns prompt=QUESTION,completion=ANSWER, or write one of {WANTED}"
        )

    @property
    def _is_table(self) -> bool:
        return self.kind.startswith((FileKind.CSV, FileKind.TSV, FileKind.PARQUET))

    def _refusal(self, text: str) -> Refusal:
        return Refusal(Reason.DATA_INVALID, f"{self.path} {text}", field=self.field)


def _names(message: str, path: str) -> bool:
    """Whether a message is about the key that was removed at `path`."""
    parent, _, key = path.rpartition(".")
    return parent in message and f'"{shown(key)}"' in message


def _instead(folder: Path) -> str:
    """Returns what to do if a path is no file."""
    if not folder.is_dir():
        return "name a file of JSON lines, CSV or Parquet"
    if any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return (
            "it is a directory of `save_to_disk`; write a file of it: "
            'datasets.load_from_disk(…).to_json("data.jsonl")'
        )
    files = sorted(one.name for one in folder.iterdir() if one.is_file())[:2]
    flags = "".join(f" --data {shown(str(folder / name))}" for name in files)
    return f"it is a directory; name its files:{flags or ' it has none'}"
