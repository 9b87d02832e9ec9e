"""The base model's tokenizer: prompts and conversations to token ids, token ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate, TextRefused
from loraplex_model.checkpoints.control.ends import end_of_turn
from loraplex_model.checkpoints.control.marks import strings_of
from loraplex_model.checkpoints.encoding import (
    DEFAULTS,
    MarkedChat,
    Message,
    PromptEncoder,
    RenderedPrompt,
)
from loraplex_model.checkpoints.tokenizer import TOKENIZER, SpeltToken, TokenizerInfo
from tokenizers import Tokenizer

from loraplex_server.runtime.lanes import Lane, Lanes
from loraplex_server.text.detokenizer import Detokenizer, NoText, TokenTexts

INLINE_CHARACTERS: Final = 2048
"""Longest text that is tokenised on the event loop, where a thread would cost more."""


class TooLong(Exception):
    """A text that exceeds the context however it is tokenised."""


@dataclass(frozen=True, slots=True)
class TextTokens:
    """A text and its tokens, with the bytes of each token if they were asked for."""

    text: str
    token_ids: list[int]
    pieces: list[bytes]


class TextTokenizer:
    """The tokenizer of a base model's directory (`loraplex_model.checkpoints.tokenizer`).

    Prompts and conversations become token ids as `PromptEncoder` describes. For a model without a
    tokenizer, requests must give token ids, and all text is "".

    Attributes:
        template: the chat template of the base model, or None.
        architecture: the architecture in the Hugging Face configuration.
        special_tokens: texts of "bos_token", "eos_token", ..., which a chat template may use.
        eos_token_ids: ids that end a completion.
    """

    def __init__(
        self,
        folder: Path,
        max_context: int,
        lane: Lane | None = None,
        *,
        eos_token_ids: Sequence[int] | None = None,
        special_tokens_in_messages: bool = False,
        chat_template: Path | None = None,
    ) -> None:
        """Long texts are tokenised in the threads of `lane`, or in some of the tokenizer's own.

        Args:
            max_context: longest prompt and completion together, in tokens.
            eos_token_ids: the loaded base's; None for those in the directory.
            special_tokens_in_messages: see `PromptEncoder`.
            chat_template: file of a template in place of the model's.

        Raises Refusal, with a message for the operator.
        """
        self._lane = lane or Lanes().text
        info = TokenizerInfo.read(folder).with_template(chat_template)
        self.architecture = info.architecture
        self.special_tokens = info.special_tokens
        self.template = info.compiled()
        self.eos_token_ids = tuple(info.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._tokenizer = _read_tokenizer(folder) if info.has_tokenizer else None
        self._encoder: PromptEncoder | None = None
        self._max_characters = max_context
        self._token_texts = TokenTexts(self._tokenizer) if self._tokenizer else None
        self._texts: dict[int, str] = {}
        self._anchor: list[int] = []
        self._anchor_text = ""
        if self._tokenizer is not None:
            self._encoder = PromptEncoder(
                self._tokenizer,
                info,
                self.template,
                special_tokens_in_messages=special_tokens_in_messages,
            )
            self.eos_token_ids = self._with_end_of_turn(self._tokenizer)
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self._max_characters *= max(map(len, vocabulary), default=1)
            self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
            self._anchor_text = self._tokenizer.decode(self._anchor, skip_special_tokens=False)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model has a tokenizer, so that prompts may be text."""
        return self._tokenizer is not None

    @property
    def spells_bytes(self) -> bool:
        """Whether every token is bytes of text, or a control token, as structured output needs."""
        return self._token_texts is not None and self._token_texts.are_bytes

    @property
    def eos_tokens(self) -> list[SpeltToken]:
        """`eos_token_ids` with their spellings."""
        return [self.spelt(token) for token in self.eos_token_ids]

    @property
    def bos_token(self) -> SpeltToken | None:
        """The token that begins every plain prompt; None if the model adds none."""
        bos = self._encoder.bos if self._encoder else None
        return None if bos is None else self.spelt(bos)

    def spelt(self, token: int) -> SpeltToken:
        """A token with its spelling in the vocabulary, which is "" without a tokenizer."""
        text = self._tokenizer.id_to_token(token) if self._tokenizer else None
        return SpeltToken(token, text or "")

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises TextRefused, TooLong."""
        encoder = self._needed()
        self._check_length(len(text))
        if len(text) <= INLINE_CHARACTERS:
            return encoder.encode(text)
        return await self._lane.run(encoder.encode, text)

    async def render_chat(
        self,
        messages: Sequence[Message],
        options: ChatOptions = DEFAULTS,
        template: ChatTemplate | None = None,
    ) -> RenderedPrompt:
        """Text and token ids of a conversation.

        Args:
            template: another chat template than the base model's.

        Raises TextRefused, TooLong.
        """
        if template is None and self.template is None:
            raise TextRefused("the base model has no chat template")
        encoder = self._needed()
        self._check_length(sum(map(_content_length, messages)))
        size = sum(map(len, strings_of([messages, options.tools, options.variables])))
        # An adapter's template may take seconds, however short the conversation is.
        is_quick = template is None and size <= INLINE_CHARACTERS

        def work(chat: MarkedChat) -> RenderedPrompt:
            marked = chat.render(chat.messages, chat.options)
            text = chat.plain(marked)
            self._check_length(len(text))
            return RenderedPrompt(text, chat.ids(marked))

        if not is_quick:
            return await self._lane.run(
                lambda: work(encoder.conversation(messages, options, template))
            )
        chat = encoder.conversation(messages, options, template)
        # The first marked text makes a second tokenizer, which takes long.
        return await self._lane.run(work, chat) if chat.is_marked else work(chat)

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

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a single token after another one, whole characters or not."""
        return b"" if self._token_texts is None else self._token_texts.raw(token)

    def is_special(self, token: int) -> bool:
        """Whether a text without special tokens leaves a token out."""
        return self._token_texts is not None and self._token_texts.is_special(token)

    async def tokens(self, text: str, begins: bool, with_bytes: bool) -> TextTokens:
        """A text of any length as tokens, behind those that begin a prompt if it `begins` one.

        Raises TextRefused.
        """
        encoder = self._needed()

        def work() -> TextTokens:
            ids = encoder.encode(text) if begins else encoder.encode_text(text)
            return TextTokens(text, ids, self._raws(ids) if with_bytes else [])

        return work() if len(text) <= INLINE_CHARACTERS else await self._lane.run(work)

    async def text_of(
        self, ids: Sequence[int], skip_special_tokens: bool, with_bytes: bool
    ) -> TextTokens:
        """Any number of tokens as a text, in which bytes that are no character become U+FFFD.

        Raises TextRefused.
        """
        self._needed()
        tokenizer = self._tokenizer
        assert tokenizer is not None, "there is an encoder without a tokenizer"

        def work() -> TextTokens:
            given = list(ids)
            text = tokenizer.decode(given, skip_special_tokens=skip_special_tokens)
            return TextTokens(text, given, self._raws(given) if with_bytes else [])

        return work() if len(ids) <= INLINE_CHARACTERS else await self._lane.run(work)

    def _raws(self, ids: Sequence[int]) -> list[bytes]:
        return [] if self._token_texts is None else self._token_texts.raws(ids)

    def _needed(self) -> PromptEncoder:
        if self._encoder is None:
            raise TextRefused("the base model has no tokenizer; send token ids")
        return self._encoder

    def _with_end_of_turn(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """`eos_token_ids` and the token with which the chat template ends an answer."""
        end = end_of_turn(tokenizer, self.template) if self.template else None
        return tuple(dict.fromkeys([*self.eos_token_ids, *([] if end is None else [end])]))

    def _check_length(self, characters: int) -> None:
        if characters > self._max_characters:
            raise TooLong


def _content_length(message: Message) -> int:
    """Characters of a message's text."""
    content = message.get("content") or ""
    return len(content) if isinstance(content, str) else sum(len(p["text"]) for p in content)


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises bare exceptions
        message = f"cannot read {folder / TOKENIZER}: {error}"
        raise Refusal(Reason.MODEL_INVALID, message) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
