"""A bound on the digits of a number in a JSON text.

The grammar of a JSON number lets a model repeat a digit until the tokens run out, which models do,
above all where a schema allows any value. So after `MOST_DIGITS` digits in a row outside of strings
no further digit is allowed, unless nothing else is: a schema may demand a longer number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

MOST_DIGITS: Final = 40
"""Digits in a row after which a number, its fraction or its exponent ends."""

_DIGITS: Final = frozenset(b"0123456789")
_QUOTE, _ESCAPE = b'"\\'


class TokenSpellings:
    """The bytes of a vocabulary's tokens, as far as numerals need them.

    Attributes:
        digits: mask of the tokens that begin with a digit, as in `constraint`.
    """

    def __init__(self, tokens: Sequence[bytes], words: int) -> None:
        """`tokens` has the bytes of each token; b"" for those that are no text."""
        self._tokens = tokens
        self.digits = np.zeros(words, np.uint32)
        for token, text in enumerate(tokens):
            if text[:1].isdigit():
                self.digits[token >> 5] |= np.uint32(1 << (token & 31))

    def __getitem__(self, token: int) -> bytes:
        return self._tokens[token]


class NumeralGuard:
    """Follows one JSON text, and forbids digits after too many of them."""

    def __init__(self, spellings: TokenSpellings) -> None:
        self._spellings = spellings
        self._in_string = False
        self._escaped = False
        self._run = 0

    def saw(self, token: int) -> None:
        """Follows the text by a token."""
        for byte in self._spellings[token]:
            if self._in_string:
                self._in_string = self._escaped or byte != _QUOTE
                self._escaped = byte == _ESCAPE and not self._escaped
            elif byte in _DIGITS:
                self._run += 1
            else:
                self._run = 0
                self._in_string = byte == _QUOTE

    def apply(self, mask: NDArray[np.uint32]) -> None:
        """Forbids digits, if there were too many and other tokens may follow."""
        if self._run < MOST_DIGITS or self._in_string:
            return
        others = mask & ~self._spellings.digits
        if others.any():
            mask[:] = others
