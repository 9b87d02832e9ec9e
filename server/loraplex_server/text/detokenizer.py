"""Incremental conversion of tokens to text, in whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT: Final = "\ufffd"
_CONTEXT: Final = 6
"""Number of prompt tokens given to the decoder, so that the first piece keeps its leading space."""


class Detokenizer:
    """Converts one completion to text, piece by piece.

    The joined pieces are the completion as decoded after its prompt, without special tokens and
    without an incomplete character at the very end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-_CONTEXT:])
        if self._decode(self._context).endswith(REPLACEMENT):
            # The prompt ends within a character, so there is no text to continue.
            self._context = []
        self._stream = DecodeStream(self._context, skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes; "" within a character."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the decoder fails on bytes that are not valid text
            text = self._resume(token)
        if text is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        """Returns the rest of the text. No token may be pushed afterwards."""
        text = self._decode(self._held).rstrip(REPLACEMENT)
        self._held.clear()
        return text

    def _resume(self, token: int) -> str:
        text = self._decode([*self._held, token])
        self._stream = DecodeStream(skip_special_tokens=True)
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class NoText:
    """Replaces `Detokenizer` if the model has no tokenizer."""

    def push(self, token: int) -> str:
        """Returns ""."""
        return ""

    def finish(self) -> str:
        """Returns ""."""
        return ""
