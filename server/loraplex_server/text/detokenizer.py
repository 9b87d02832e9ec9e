"""Tokens to text, a step at a time, never half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT: Final = "\ufffd"
_CONTEXT: Final = 6
"""Prompt tokens that the decoder sees, so that a first piece keeps its leading space."""


class Detokenizer:
    """The text of one completion.

    All pieces joined are the completion decoded after its prompt, special tokens left out, less the
    bytes at the very end that are no whole character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-_CONTEXT:])
        if self._decode(self._context).endswith(REPLACEMENT):
            # The prompt ends within a character: there is no text to continue from.
            self._context = []
        self._stream = DecodeStream(self._context, skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that the next token completes; "" while a character is unfinished."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the decoder lost its place among bytes that are no text
            text = self._resume(token)
        if text is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        """What was held back and is whole after all; nothing may be pushed afterwards."""
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
    """Stands for a `Detokenizer` where the model has no tokenizer."""

    def push(self, token: int) -> str:
        """Always ""."""
        return ""

    def finish(self) -> str:
        """Always ""."""
        return ""
