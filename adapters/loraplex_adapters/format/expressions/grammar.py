"""The tree of an expression over module names, in Python's syntax of regular expressions.

Understood are the forms that trainers write: names, `.`, classes, groups, alternatives, repeats,
anchors, word boundaries and look-ahead. Everything else is refused by its name and position.

Names of modules consist of the 64 characters of `ALPHABET`, so a set of characters is an integer of
64 bits, and a character that cannot occur in a name is the empty set.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import NoReturn

MAX_CHARACTERS = 4096
"""Most characters of one expression."""

MAX_SIZE = 4096
"""Most states of one expression, after its repeats have been written out."""

MAX_DIGITS = 6
"""Most digits of a repeat's bound."""

MAX_DEPTH = 32
"""Most groups within each other."""

ALPHABET = string.ascii_letters + string.digits + "_."
BIT = {character: 1 << n for n, character in enumerate(ALPHABET)}
ANY = (1 << len(ALPHABET)) - 1
WORD = ANY & ~BIT["."]
DIGIT = sum(BIT[digit] for digit in string.digits)

_CLASSES = {"d": DIGIT, "D": ANY & ~DIGIT, "w": WORD, "W": ANY & ~WORD, "s": 0, "S": ANY}
_DIGITS = frozenset(string.digits)
_CONTROLS = frozenset("afnrtv")
_ASSERTIONS = {"b": "boundary", "B": "inside", "A": "start", "Z": "end"}
_NAMED = {
    "<=": "look-behind",
    "<!": "look-behind",
    "P=": "a reference to a group",
    "(": "a condition",
    ">": "an atomic group",
    "#": "a comment",
}


class NotEvaluated(ValueError):
    """An expression that is not understood or too large; the message says why and where."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """One character of a set, given by the bits of `ALPHABET`."""

    bits: int


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place: "start", "end", "boundary" of a word, or "inside" (no boundary)."""

    place: str


@dataclass(frozen=True, slots=True)
class Ahead:
    """A place whose rest begins with `tree`, or does not if `negative`."""

    tree: Tree
    negative: bool


@dataclass(frozen=True, slots=True)
class Sequence:
    """Parts one after the other."""

    parts: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several alternatives."""

    options: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part at least `low` and at most `high` times; None for any number of times."""

    part: Tree
    low: int
    high: int | None


Tree = OneOf | Anchor | Ahead | Sequence | Choice | Repeat


def parse(text: str) -> Tree:
    """Returns the tree of an expression; raises NotEvaluated. Linear in the text's length."""
    if len(text) > MAX_CHARACTERS:
        message = f"is an expression of {len(text)} characters; at most {MAX_CHARACTERS} are read"
        raise NotEvaluated(message)
    parser = _Parser(text)
    tree = parser.choice(0)
    if parser.at < len(text):
        parser.refuse("has a ) without a (")
    return tree


class _Parser:
    """A recursive descent over one text; `at` is the position of the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self._within_ahead = False

    def refuse(self, problem: str, at: int | None = None) -> NoReturn:
        where = (self.at if at is None else at) + 1
        raise NotEvaluated(f"{problem} at character {where}")

    def choice(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            self.refuse(f"has more than {MAX_DEPTH} groups within each other")
        options = [self._sequence(depth)]
        while self._takes("|"):
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self, depth: int) -> Tree:
        parts: list[Tree] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self._repeated(self._atom(depth)))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _atom(self, depth: int) -> Tree:
        start, character = self.at, self.text[self.at]
        self.at += 1
        match character:
            case "(":
                return self._group(start, depth)
            case "[":
                return OneOf(self._class(start))
            case "\\":
                return self._escape(start)
            case ".":
                return OneOf(ANY)
            case "^":
                return Anchor("start")
            case "$":
                return Anchor("end")
            case "*" | "+" | "?":
                self.refuse(f"has a {character} that repeats nothing", start)
        return OneOf(BIT.get(character, 0))

    def _group(self, start: int, depth: int) -> Tree:
        ahead = None
        if self._takes("?"):
            rest = self.text[self.at : self.at + 2]
            if rest[:1] in ("=", "!"):
                ahead = rest[0]
                self.at += 1
            elif named := next((n for k, n in _NAMED.items() if rest.startswith(k)), None):
                self.refuse(f"uses {named}, which is not evaluated,", start)
            elif rest == "P<":
                self._name(start)
            elif not self._takes(":"):
                self.refuse("uses flags within the expression, which are not evaluated,", start)
        if ahead and self._within_ahead:
            self.refuse("uses look-ahead within look-ahead, which is not evaluated,", start)
        self._within_ahead |= ahead is not None
        inner = self.choice(depth + 1)
        self._within_ahead &= ahead is None
        if not self._takes(")"):
            self.refuse("has a ( without a )", start)
        if ahead is not None:
            return Ahead(inner, ahead == "!")
        # In a group, a place may be repeated.
        return Sequence((inner,)) if isinstance(inner, Anchor) else inner

    def _name(self, start: int) -> None:
        end = self.text.find(">", self.at)
        if end < 0 or not self.text[self.at + 2 : end].isidentifier():
            self.refuse("has a group without a proper name", start)
        self.at = end + 1

    def _escape(self, start: int) -> Tree:
        letter = self._escaped(start)
        if letter in _ASSERTIONS:
            return Anchor(_ASSERTIONS[letter])
        return OneOf(self._escaped_bits(letter, start))

    def _escaped(self, start: int) -> str:
        if self.at == len(self.text):
            self.refuse("ends in a backslash", start)
        self.at += 1
        return self.text[self.at - 1]

    def _escaped_bits(self, letter: str, start: int) -> int:
        if letter in _CLASSES:
            return _CLASSES[letter]
        if letter.isascii() and letter.isalnum() and letter not in _CONTROLS:
            kind = "a reference to a group" if letter.isdigit() else f"\\{letter}"
            self.refuse(f"uses {kind}, which is not evaluated,", start)
        return 0 if letter in _CONTROLS else BIT.get(letter, 0)

    def _class(self, start: int) -> int:
        negative = self._takes("^")
        bits, first = 0, True
        while first or not self._takes("]"):
            if self.at == len(self.text):
                self.refuse("has a [ without a ]", start)
            bits |= self._class_item()
            first = False
        return ANY & ~bits if negative else bits

    def _class_item(self) -> int:
        start = self.at
        low, bits = self._class_character()
        text = self.text
        if text[self.at : self.at + 1] != "-" or text[self.at + 1 : self.at + 2] in ("]", ""):
            return bits
        self.at += 1
        high, _ = self._class_character()
        if not low or not high or low > high:
            self.refuse("has a range without two characters in order", start)
        return sum(bit for character, bit in BIT.items() if low <= character <= high)

    def _class_character(self) -> tuple[str, int]:
        """A character and its bits; the character is "" for a class such as `\\d`."""
        start, character = self.at, self.text[self.at]
        self.at += 1
        if character != "\\":
            return character, BIT.get(character, 0)
        letter = self._escaped(start)
        if letter == "b":
            return "\b", 0
        bits = self._escaped_bits(letter, start)
        return ("" if letter in _CLASSES or letter in _CONTROLS else letter), bits

    def _repeated(self, part: Tree) -> Tree:
        start = self.at
        bounds = self._bounds()
        if bounds is None:
            return part
        if isinstance(part, Anchor):
            self.refuse("repeats a place", start)
        self._takes("?")  # a lazy repeat matches the same names
        if self.text[self.at : self.at + 1] == "+":
            self.refuse("uses a possessive repeat, which is not evaluated,", start)
        low, high = bounds
        if high is not None and low > high:
            self.refuse("has a repeat whose bounds are in the wrong order", start)
        again = self.at
        if self._bounds() is not None:
            self.refuse("repeats a repeat", again)
        return Repeat(part, low, high)

    def _bounds(self) -> tuple[int, int | None] | None:
        """The bounds of a repeat, if one follows."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return bounds
        if self.text[self.at : self.at + 1] != "{":
            return None
        start = self.at
        self.at += 1
        low = self._digits()
        comma = self._takes(",")
        high = self._digits() if comma else low
        if not (low or comma) or not self._takes("}"):
            self.at = start
            return None  # as in Python, a plain {
        if max(len(low), len(high)) > MAX_DIGITS:
            self.refuse("has a repeat with too large a bound", start)
        return int(low or 0), int(high) if high else None

    def _digits(self) -> str:
        start = self.at
        while self.text[self.at : self.at + 1] in _DIGITS:
            self.at += 1
        return self.text[start : self.at]

    def _takes(self, character: str) -> bool:
        if self.text[self.at : self.at + 1] != character:
            return False
        self.at += 1
        return True
