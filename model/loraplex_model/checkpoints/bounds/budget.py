"""The budget of one rendering: every piece of work is counted, up to a limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, MappingView
from typing import Any, Final, NoReturn

from jinja2 import pass_eval_context
from jinja2.nodes import EvalContext
from jinja2.runtime import markup_join, str_join

MAX_WORK: Final = 300_000
"""Units of work of one rendering: some seconds at most. A unit is a pass of a loop, a call or the
use of a filter, `CHARACTERS` characters of a text, or `NODES` values of a list or mapping."""

MAX_TEXT: Final = 4 << 20
"""Characters of a text that a template makes, and values in a list or mapping."""

CHARACTERS: Final = 128
NODES: Final = 16

# Tuples, since a union would be made each time, and these are asked for every value.
_WALKED: Final = (list, tuple, set, Mapping, MappingView)
_WEIGHED: Final = (*_WALKED, frozenset)
_COUNTED: Final = (*_WALKED, range)
_SINGLE: Final = frozenset({int, float, bool, type(None)})


class TextRefused(Exception):
    """A text or conversation cannot be turned into tokens; the message may be shown to a client."""


class TooMuchWork(TextRefused):
    """A template exceeds a bound."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template needs too much work or memory for this conversation; shorten it, or "
            "send a prompt"
        )


def fits(size: int) -> None:
    """Raises TooMuchWork for a text of `size` characters that is too long to make."""
    if size > MAX_TEXT:
        raise TooMuchWork


class Budget:
    """Counts the work of renderings, one at a time in each thread."""

    def __init__(self) -> None:
        self._state = threading.local()

    def begin(self) -> None:
        """Starts the count of a rendering in this thread."""
        self._state.work = 0
        self._state.weights = {}

    def end(self) -> None:
        """Drops what was kept about the values of the rendering in this thread."""
        self._state.weights = {}

    def spend(self, work: int = 1) -> str:
        """Counts work. Raises TooMuchWork. Returns "" for use as a statement."""
        spent = self._state.work = getattr(self._state, "work", 0) + work
        if spent > MAX_WORK:
            raise TooMuchWork
        return ""

    def weight(self, value: Any) -> int:
        """Number of values that a value holds at any depth; eight characters count as much as one.

        A value that is held several times counts each time, since whatever walks through it does
        so several times. Raises TooMuchWork beyond `MAX_TEXT`.
        """
        if isinstance(value, str):
            return 1 + len(value) // 8
        if type(value) in _SINGLE or not isinstance(value, _WEIGHED):
            return 1
        if not hasattr(self._state, "weights"):
            self._state.weights = {}
        known: dict[int, tuple[Any, int]] = self._state.weights
        if id(value) in known:
            return known[id(value)][1]
        total = 1
        inner: Any = value
        if isinstance(value, Mapping):
            inner = (part for pair in value.items() for part in pair)
        for item in inner:
            # Most values are single ones, for which a call would take longest.
            total += 1 if type(item) in _SINGLE else self.weight(item)
            if total > MAX_TEXT:
                raise TooMuchWork
        if not isinstance(value, MappingView):
            # The value is kept, so that no other one takes its identity. A template cannot change
            # it, so its weight stays.
            known[id(value)] = value, total
        return total

    def made(self, value: Any) -> Any:
        """Counts a value that was made by its length, and the values of an iterator as they come.

        Raises TooMuchWork for a value that is too large to walk through.
        """
        if isinstance(value, str):
            fits(len(value))
            self.spend(len(value) // CHARACTERS)
        elif isinstance(value, int):
            self.spend(value.bit_length() // 1024)
        elif isinstance(value, _COUNTED):
            self.weight(value)
            self.spend(len(value) // NODES)
        elif isinstance(value, Iterator):
            return self._counted(value)
        return value

    def walked(self, value: Any) -> Any:
        """Counts a value that is walked through at any depth."""
        if isinstance(value, _WALKED):
            self.spend(self.weight(value) // NODES)
            return value
        return self.made(value)

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend()
            yield self.made(value)

    def compared(self, value: Any) -> Any:
        """Counts an operand of a comparison."""
        if isinstance(value, str):
            self.spend(len(value) // (8 * CHARACTERS))
        elif isinstance(value, _WALKED):
            self.spend(self.weight(value) // NODES)
        return value

    def sought(self, value: Any) -> Any:
        """Counts an operand of `in` or a key; a mapping finds its keys without a search."""
        return value if isinstance(value, Mapping) else self.compared(value)

    @pass_eval_context
    def joined(self, context: EvalContext, pieces: list[Any]) -> str:
        """The operator `~`, which escapes HTML in blocks of the tag `autoescape`."""
        texts = [self.shown(piece) for piece in pieces]
        fits(sum(map(len, texts)))
        return markup_join(texts) if context.autoescape else str_join(texts)

    def shown(self, value: Any) -> str:
        """The text of a value, counted before and after it is made."""
        if not isinstance(value, str):
            value = str(self.walked(value))
        text: str = self.made(value)
        return text


def refuse(message: object) -> NoReturn:
    """The function `raise_exception` of templates, whose messages are for the caller."""
    raise TextRefused(f"the model's chat template refuses: {str(message)[:1000]}")
