"""Text that arrives in pieces, read as if all of it were there.

Functions that read return generators, which yield whenever they need text that has not arrived.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import Final, TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]
"""A computation that yields whenever it has to wait for text."""

MAX_DEPTH: Final = 256
"""Most brackets within each other in a value."""

_SPACE: Final = re.compile(r"\s*")
_IN_STRING: Final = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
_JSON: Final = re.compile(r"[-+.,:\s0-9a-zA-Z]*")
_ANY: Final = re.compile(r"[^\"'()\[\]{}]*")
_CLOSERS: Final = {"{": "}", "[": "]", "(": ")"}


class Malformed(Exception):
    """The text is no call. The source stands where that became clear."""


class Source:
    """The text that has arrived.

    Attributes:
        text: the text, without what was dropped.
        at: position in `text` of the next character to read.
        ended: whether all text has arrived.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def drop(self) -> None:
        """Forgets the text that has been read; positions become invalid."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Steps[bool]:
        """Waits for more text. False if there is none."""
        size = len(self.text)
        while not self.ended:
            yield
            if len(self.text) > size:
                return True
        return False

    def peek(self) -> Steps[str]:
        """The next character, which stays unread; "" at the end."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def space(self) -> Steps[None]:
        """Skips white space."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or not (yield from self.more()):
                return

    def take(self, *options: str) -> Steps[str]:
        """Reads the longest of the options that comes next; "" if none does."""
        while True:
            rest = self.text[self.at : self.at + max(map(len, options), default=0)]
            if not any(len(each) > len(rest) and each.startswith(rest) for each in options):
                break
            if not (yield from self.more()):
                break
        fitting = [each for each in options if rest.startswith(each)]
        found = max(fitting, key=len, default="")
        self.at += len(found)
        return found

    def until(self, *marks: str) -> Steps[tuple[str, str]]:
        """Reads up to the first of the marks and the mark itself; returns both.

        Raises Malformed if none comes.
        """
        first, start = self.at, self.at
        longest = max(map(len, marks))
        while True:
            found = [(self.text.find(mark, start), mark) for mark in marks]
            places = sorted((place, -len(mark), mark) for place, mark in found if place >= 0)
            if places:
                place, _, mark = places[0]
                self.at = place + len(mark)
                return self.text[first:place], mark
            start = max(first, len(self.text) - longest + 1)
            if not (yield from self.more()):
                self.at = len(self.text)
                raise Malformed

    def json(self, passed: Callable[[str], None] | None = None) -> Steps[str]:
        """Reads an object or a list of JSON; returns its text.

        The brackets, strings and characters are checked as they come, the rest is not. `passed`
        gets each part of the text as soon as it is read. Raises Malformed.
        """
        return self._bracketed('"', _JSON, "{[", passed)

    def bracketed(self) -> Steps[str]:
        """Reads text from an opening bracket to its closing one, both in Python's syntax.

        Raises Malformed.
        """
        return self._bracketed("\"'", _ANY, "([{", None)

    def _bracketed(
        self,
        quotes: str,
        plain: re.Pattern[str],
        openers: str,
        passed: Callable[[str], None] | None,
    ) -> Steps[str]:
        begin = told = self.at
        closers: list[str] = []
        quote = ""
        while True:
            found = (_IN_STRING[quote] if quote else plain).match(self.text, self.at)
            self.at = found.end() if found and (quote or closers) else self.at
            needed = 2 if quote and self.text[self.at : self.at + 1] == "\\" else 1
            if self.at + needed > len(self.text):
                if passed is not None:
                    passed(self.text[told : self.at])
                    told = self.at
                if not (yield from self.more()):
                    self.at = len(self.text)
                    if passed is not None:
                        passed(self.text[told:])
                    raise Malformed
                continue
            letter = self.text[self.at]
            if quote:
                quote = "" if letter == quote else quote
            elif letter in openers and len(closers) < MAX_DEPTH:
                closers.append(_CLOSERS[letter])
            elif closers and letter in quotes:
                quote = letter
            elif closers and letter == closers[-1]:
                closers.pop()
            else:
                if passed is not None:
                    passed(self.text[told : self.at])
                raise Malformed
            self.at += needed
            if not closers:
                if passed is not None:
                    passed(self.text[told : self.at])
                return self.text[begin : self.at]
