"""Reads the lines of a JSONL file as examples, strictly: nothing unknown is guessed at.

A line is one JSON object of one of four shapes; a file may mix them:

    {"messages": [{"role": "user", "content": …}, …, {"role": "assistant", "content": …}]}
    {"prompt": …, "completion": …}        two strings, or two lists of messages
    {"instruction": …, "input": …, "output": …}        input may be absent or ""
    {"text": …}

Keys with information about an example (`NOTES`, and all that start with "_") are ignored and
counted. Any other key is refused: it may be misspelt, or change the meaning of the example. A byte
order mark at the start of the file and CRLF line ends are accepted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from loraplex_adapters.format.strict_json import loads
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.data.problems import Problems
from loraplex_training.data.shapes import WANTED, DataRecord, kind_of, read_record

MAX_LINE: Final = 1 << 20
MAX_FILE: Final = 512 << 20
"""Bytes of a file. The tokens of a whole data set are in memory, 16 bytes each."""


class RecordFile:
    """A JSONL file, to be read once.

    Attributes:
        digest: SHA-256 (hex) of the file's bytes once it has been read, else "".
        ignored: keys that were ignored, with the number of times.
    """

    def __init__(self, path: Path, problems: Problems, field: str = "data") -> None:
        """Bad lines go to `problems`; `field` is the option that names the file."""
        self.field = field
        self.path = path
        self.digest = ""
        self.ignored: Counter[str] = Counter()
        self._problems = problems

    def __iter__(self) -> Iterator[DataRecord]:
        """Yields the valid lines.

        Raises Refusal(DATA_INVALID) if the file is missing, empty or too large.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise self._refusal("is not a file; name a JSONL file")
            size = self.path.stat().st_size
            if size > MAX_FILE:
                raise self._refusal(
                    f"has {size:,} bytes; at most {MAX_FILE:,} are possible: train on a part of it"
                )
            with self.path.open("rb") as file:
                yield from self._records(file)
        except OSError as error:
            raise self._refusal(f"cannot be read: {error.strerror or error}") from error

    def _records(self, file: BinaryIO) -> Iterator[DataRecord]:
        sha, number = hashlib.sha256(), 0
        for number, line in enumerate(_lines(file, sha.update), 1):
            try:
                if len(line) > MAX_LINE:
                    raise ValueError(f"is longer than {MAX_LINE:,} bytes")
                first = number == 1
                yield self._record(line.removeprefix(b"\xef\xbb\xbf") if first else line, number)
            except ValueError as error:
                self._problems.add(self.path, number, str(error), self.field)
        if not number:
            raise self._refusal(f"is empty; each line is an example, such as {WANTED}")
        self.digest = sha.hexdigest()

    def _refusal(self, text: str) -> Refusal:
        return Refusal(Reason.DATA_INVALID, f"{self.path} {text}", field=self.field)

    def _record(self, line: bytes, number: int) -> DataRecord:
        """Parses a line. Raises ValueError with the reason why it cannot be used."""
        if not line.strip():
            raise ValueError("is empty; remove it")
        if line.lstrip().startswith(b"["):
            raise ValueError(f"is a JSON list; write one object on each line, one of {WANTED}")
        value = loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"is {kind_of(value)}, not an object; each line is one of {WANTED}")
        return read_record(value, number, self.ignored)


def _lines(file: BinaryIO, seen: Callable[[bytes], None]) -> Iterator[bytes]:
    """Yields lines without their ends; of one that is too long, only its beginning."""
    while line := file.readline(MAX_LINE + 2):
        seen(line)
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE)):
            seen(rest)
        yield line.removesuffix(b"\n").removesuffix(b"\r")
