"""The base model's tokenizer: prompts and conversations to token ids, token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from jinja2 import TemplateError
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.chat import ChatTemplate, TextRefused
from loraplex_model.checkpoints.tokenizer import TOKENIZER, TokenizerInfo
from tokenizers import Tokenizer

from loraplex_server.runtime.lanes import Lane, Lanes
from loraplex_server.text.detokenizer import Detokenizer, NoText, TokenTexts

INLINE_CHARACTERS: Final = 2048
"""Longest text that is tokenised on the event loop, where a thread would cost more."""


class TooLong(Exception):
    """A text that exceeds the context however it is tokenised."""


class TextTokenizer:
    """The tokenizer of a base model's directory (`loraplex_model.checkpoints.tokenizer`).

    A prompt gets the ids that Hugging Face's tokenizer returns for it, including special tokens
    such as BOS. A rendered conversation contains its special tokens, so none are added. For a model
    without a tokenizer, requests must give token ids, and all text is "".
    """

    def __init__(self, folder: Path, max_context: int, lane: Lane | None = None) -> None:
        """Long texts are tokenised in the threads of `lane`, or in some of the tokenizer's own.

        Raises Refusal, with a message for the operator.
        """
        self._lane = lane or Lanes().text
        info = TokenizerInfo.read(folder)
        self._tokenizer = _read_tokenizer(folder) if info.has_tokenizer else None
        self._chat = _chat_template(info)
        self._max_characters = max_context
        self._token_texts = TokenTexts(self._tokenizer) if self._tokenizer else None
        self._texts: dict[int, str] = {}
        self._anchor: list[int] = []
        self._anchor_text = ""
        if self._tokenizer is not None:
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self._max_characters *= max(map(len, vocabulary), default=1)
            self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
            self._anchor_text = self._tokenizer.decode(self._anchor, skip_special_tokens=False)

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises TextRefused, TooLong."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation. Raises TextRefused, TooLong."""
        if self._chat is None:
            raise TextRefused("the base model has no chat template")
        size = sum(len(m["content"]) for m in messages)
        if size > self._max_characters:
            raise TooLong
        if size + len(messages) > INLINE_CHARACTERS:
            text = await self._lane.run(self._chat.render, messages)
        else:
            text = self._chat.render(messages)
        return await self._encode(text, add_special_tokens=False)

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool = True) -> Detokenizer:
        """Returns a detokenizer for a completion of `prompt`."""
        if self._token_texts is None:
            return NoText()
        return self._token_texts.detokenizer(prompt, skip_special_tokens)

    def token_text(self, token: int) -> str:
        """Text of a single token; bytes that are not a whole character become U+FFFD."""
        if self._tokenizer is None:
            return ""
        text = self._texts.get(token)
        if text is None:
            # Decoded after another token, because some decoders strip a leading space.
            pair = self._tokenizer.decode([*self._anchor, token], skip_special_tokens=False)
            text = self._texts[token] = pair[len(self._anchor_text) :]
        return text

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise TextRefused("the base model has no tokenizer; send token ids")
        if len(text) > self._max_characters:
            raise TooLong
        if len(text) <= INLINE_CHARACTERS:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

        def work() -> list[int]:
            # The batch call releases the GIL; the single one does not.
            encoded = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoded[0].ids)

        return await self._lane.run(work)


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises bare exceptions
        message = f"cannot read {folder / TOKENIZER}: {error}"
        raise Refusal(Reason.MODEL_INVALID, message) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _chat_template(info: TokenizerInfo) -> ChatTemplate | None:
    if info.chat_template is None:
        return None
    try:
        return ChatTemplate(info.chat_template, info.special_tokens)
    except TemplateError as error:
        message = f"the model's chat template does not compile: {error}"
        raise Refusal(Reason.MODEL_INVALID, message) from error
