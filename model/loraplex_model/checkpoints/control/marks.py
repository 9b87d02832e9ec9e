"""Marks in the strings of a conversation, that distinguish its control tokens from the template's.

A mark is a noncharacter of Unicode that the conversation does not hold. It is put into every
control token that a string spells out, and at the ends of strings that could form one together with
the text around them. In the rendered text, a control token without a mark is the template's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraplex_model.checkpoints.chat import TextRefused
from loraplex_model.checkpoints.control.spellings import Spellings

NONCHARACTERS: Final = frozenset(map(chr, range(0xFDD0, 0xFDF0)))

_FIXED: Final = frozenset({"role", "type"})
"""Keys whose values templates compare with words."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Two noncharacters that a conversation does not hold.

    Attributes:
        inside: stands after the first character of a control token.
        edge: stands where a string could form a control token with the text before or after it.
    """

    inside: str
    edge: str

    @staticmethod
    def unused_in(texts: Iterable[str]) -> Marks:
        """Raises TextRefused if the texts hold nearly all noncharacters."""
        used: set[str] = set()
        for text in texts:
            if not text.isascii():
                used |= NONCHARACTERS.intersection(text)
        free = sorted(NONCHARACTERS - used)
        if len(free) < 2:
            raise TextRefused(
                "the conversation holds the noncharacters U+FDD0 to U+FDEF, of which two must be "
                "left unused; remove them"
            )
        return Marks(free[0], free[1])

    def are_in(self, text: str) -> bool:
        """Whether a text holds a mark."""
        return self.inside in text or self.edge in text

    def remove(self, text: str) -> str:
        """The text without marks."""
        return text.replace(self.inside, "").replace(self.edge, "")

    def mark(self, text: str, spellings: Spellings) -> str:
        """The text with marks in the words that it spells out, and at its ends if necessary.

        White space at the ends, which templates strip, is left outside of the marks.
        """
        marked = spellings.split_first(text, self.inside)
        core = marked.rstrip()
        if spellings.begins_at_end_of(core):
            marked = core + self.edge + marked[len(core) :]
        if spellings.begins_at_end_of(marked):
            marked += self.edge
        core = marked.lstrip()
        if spellings.ends_at_start_of(core):
            marked = marked[: len(marked) - len(core)] + self.edge + core
        if spellings.ends_at_start_of(marked):
            marked = self.edge + marked
        return marked

    def mark_all(self, value: Any, spellings: Spellings) -> Any:
        """A copy of a value of JSON's kinds whose strings and keys are marked.

        Keys that are names, and roles and types that are, stay as they are: templates look for
        them.
        """
        if isinstance(value, str):
            return self.mark(value, spellings)
        if isinstance(value, Mapping):
            return {
                _marked_key(key, self, spellings): item
                if key in _FIXED and isinstance(item, str) and item.isidentifier()
                else self.mark_all(item, spellings)
                for key, item in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.mark_all(item, spellings) for item in value]
        return value


def _marked_key(key: str, marks: Marks, spellings: Spellings) -> str:
    return key if key.isidentifier() else marks.mark(key, spellings)


def strings_of(value: Any) -> Iterator[str]:
    """All strings of a value of JSON's kinds, keys included, in no particular order."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            left += item.keys()
            left += item.values()
        elif isinstance(item, Sequence) and not isinstance(item, bytes):
            left += item
