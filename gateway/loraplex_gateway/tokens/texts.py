"""Turns texts into tokens and back, through the server."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from loraplex import AsyncClient

_REMEMBERED: Final = 4096


class VocabularyTexts:
    """Texts of tokens. The vocabulary is the server's, and all callers may know it."""

    def __init__(self) -> None:
        self._texts: OrderedDict[int, str] = OrderedDict()

    async def one(self, client: AsyncClient, token: int) -> str:
        """The text of one token, decoded alone. Raises LoraplexError."""
        if token not in self._texts:
            self._texts[token] = await self.text(client, [token])
            while len(self._texts) > _REMEMBERED:
                self._texts.popitem(last=False)
        return self._texts[token]

    async def text(self, client: AsyncClient, tokens: Sequence[int]) -> str:
        """The text of tokens, with that of special ones. Raises LoraplexError."""
        if not tokens:
            return ""
        return (await client.detokenize(tokens)).text

    async def plain_tokens(self, client: AsyncClient, prompt: str | list[int]) -> list[int]:
        """The tokens of a text, without one that begins a prompt. Raises LoraplexError."""
        if not isinstance(prompt, str):
            return prompt
        return list((await client.tokenize(prompt, special_tokens=False)).token_ids)
