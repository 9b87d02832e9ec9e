"""Incremental conversion of tokens to text by decoding the newest tokens again with each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT: Final = "\ufffd"
_CONTEXT: Final = 6
"""Number of prompt tokens given to the decoder, so that the first piece keeps its leading space."""

_WINDOW: Final = 32
"""Most tokens without a whole character at their end that are decoded again with the next one."""

_CHARACTER: Final = 4
"""Most tokens of one character: a token has one byte at least."""


class StreamText:
    """Text of a tokenizer about whose decoder nothing is known.

    The joined pieces are the completion as decoded after its prompt, without U+FFFD at the very
    end, which may be an incomplete character. The time per token does not grow with the
    number of tokens without a whole character before it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = list(prompt[-_CONTEXT:])
        if self._decode(self._context).endswith(REPLACEMENT):
            # The prompt ends within a character, so there is no text to continue.
            self._context = []
        self._stream = DecodeStream(self._context, skip_special_tokens=self._skip)
        self._held: list[int] = []
        self._behind: list[str] = []

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes; "" within a character."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the decoder fails on bytes that are not valid text
            text = self._resume(token)
        self._held.append(token)
        if text is None:
            if len(self._held) == _WINDOW:
                self._shorten()
            return ""
        self._context, self._held = self._held, []
        return self._after_behind(text)

    def finish(self) -> str:
        """Returns the rest of the text. No token may be pushed afterwards."""
        text = self._after_behind(self._decode(self._held)).rstrip(REPLACEMENT)
        self._held.clear()
        return text

    def _after_behind(self, text: str) -> str:
        if self._behind:
            text = "".join((*self._behind, text))
            self._behind.clear()
        return text

    def _shorten(self) -> None:
        """Decodes the older held tokens once and for all; those of the last character stay held.

        The text is not returned yet: it may be the incomplete end of the completion.
        """
        held = [token for token in self._held if not self._is_special(token)]
        whole = self._decode(held)
        for kept in range(_CHARACTER, _WINDOW // 2):
            before, after = self._decode(held[:-kept]), self._decode(held[-kept:])
            if before + after == whole:  # otherwise a character has tokens on both sides
                break
        self._behind.append(before)
        self._held = held[-kept:]
        # Without any held token the text before them still decides on the space of the next word.
        self._stream = DecodeStream(self._held or self._context, skip_special_tokens=self._skip)

    def _is_special(self, token: int) -> bool:
        """Whether a token has no text because it is a special one."""
        return not self._decode([token]) and bool(
            self._tokenizer.decode([token], skip_special_tokens=False)
        )

    def _resume(self, token: int) -> str:
        text = self._decode([*self._held, token])
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=self._skip))
