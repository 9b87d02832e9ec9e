"""The base model's tokenizer: text and conversations to token ids, and single tokens to text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from loraplex_server.text.chat import ChatRefused, ChatTemplate
from loraplex_server.text.detokenizer import Detokenizer

INLINE_CHARACTERS: Final = 2048
"""Shorter texts are tokenised on the event loop: a thread's round trip would cost more."""

_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class TokenizerError(Exception):
    """The tokenizer's files cannot be used; the message is for the operator."""


class TooLong(Exception):
    """A text that cannot fit, however it is tokenised."""


class TextTokenizer:
    """Reads `tokenizer.json` and, for chat, `tokenizer_config.json` and `chat_template.jinja`.

    Text becomes the ids that Hugging Face's tokenizer gives when it is called, special tokens such
    as BOS included; a rendered conversation carries its own special tokens and gets no others.
    """

    def __init__(self, folder: Path, max_context: int) -> None:
        """Raises TokenizerError."""
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise TokenizerError(f"cannot read {folder / 'tokenizer.json'}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_config(folder / "tokenizer_config.json")
        self._chat = _chat_template(folder, config)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._max_characters = max_context * max(map(len, vocabulary), default=1)
        self._texts: dict[int, str] = {}
        anchor = self._tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor = anchor[-1:]
        self._anchor_text = self._tokenizer.decode(self._anchor, skip_special_tokens=False)

    @property
    def has_chat(self) -> bool:
        """Whether the base model brings a chat template."""
        return self._chat is not None

    async def encode(self, text: str) -> list[int]:
        """The ids of a prompt. Raises TooLong."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation. Raises ChatRefused, TooLong."""
        if self._chat is None:
            raise ChatRefused("the base model has no chat template")
        size = sum(len(m["content"]) for m in messages)
        if size > self._max_characters:
            raise TooLong
        if size > INLINE_CHARACTERS:
            text = await asyncio.to_thread(self._chat.render, messages)
        else:
            text = self._chat.render(messages)
        return await self._encode(text, add_special_tokens=False)

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """Turns a completion of `prompt` into text."""
        return Detokenizer(self._tokenizer, prompt)

    def token_text(self, token: int) -> str:
        """One token's text on its own; bytes that are no whole character show as U+FFFD."""
        text = self._texts.get(token)
        if text is None:
            # Decoded behind another token, since some decoders strip a leading space.
            pair = self._tokenizer.decode([*self._anchor, token], skip_special_tokens=False)
            text = self._texts[token] = pair[len(self._anchor_text) :]
        return text

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > self._max_characters:
            raise TooLong
        if len(text) <= INLINE_CHARACTERS:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

        def work() -> list[int]:
            # The batch call lets other threads run meanwhile; the single one does not.
            encoded = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
            return list(encoded[0].ids)

        return await asyncio.to_thread(work)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
    return config if isinstance(config, dict) else {}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named ones: the default
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    special = {}
    for name in _SPECIAL:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            special[name] = token
    try:
        return ChatTemplate(source, special)
    except Exception as error:
        raise TokenizerError(f"the chat template does not compile: {error}") from error
