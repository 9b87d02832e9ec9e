"""Where the files of an adapter to register or examine come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

from loraplex_adapters.format.files import Directory
from loraplex_adapters.format.foreign.notes import MAX_NOTED_FILES

Source: TypeAlias = Callable[[], AbstractContextManager[Directory]]
"""Opens the files of an adapter."""


class ImportedFolder:
    """A source that remembers the names of the files in it, for notes.

    Attributes:
        names: the names when it was last opened.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.names: Sequence[str] = ()

    @contextmanager
    def __call__(self) -> Iterator[Directory]:
        with self._source() as opened:
            self.names = opened.names(MAX_NOTED_FILES)
            yield opened
