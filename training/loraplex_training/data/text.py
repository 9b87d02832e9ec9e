"""Tokenizer and chat template of the base model, used exactly as the server uses them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate, TextRefused
from loraplex_model.checkpoints.control.ends import end_of_turn
from loraplex_model.checkpoints.encoding import (
    DEFAULTS,
    MarkedChat,
    Message,
    PromptEncoder,
    RenderedPrompt,
)
from loraplex_model.checkpoints.tokenizer import TOKENIZER, TokenizerInfo
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

TEMPLATE_TIME: Final = datetime(2024, 7, 26)
"""Date for templates that write the current one, so that a data set does not change overnight."""


class BaseText:
    """A base model's tokenizer and chat template.

    Attributes:
        eos: id appended to an answer or text that does not end with an end token: the
            tokenizer's EOS if it ends a generation.
        eos_ids: all ids that end a generation.
        template_digest: SHA-256 (hex) of the chat template's source, or "".
        tokenizer_digest: SHA-256 (hex) of tokenizer.json.
    """

    def __init__(
        self,
        directory: Path,
        eos_token_ids: Sequence[int],
        *,
        special_tokens_in_messages: bool = False,
        chat_template: Path | None = None,
    ) -> None:
        """Reads tokenizer and template from `LoadedBase.directory`.

        Args:
            eos_token_ids: `BaseWeights.eos_token_ids`.
            special_tokens_in_messages: see `PromptEncoder`.
            chat_template: file of a template in place of the model's.

        Raises:
            Refusal: CONFIG_INVALID, if the base model has no tokenizer or EOS, or a template that
                does not compile.
        """
        path = directory / TOKENIZER
        try:
            info = TokenizerInfo.read(directory).with_template(chat_template)
            if not info.has_tokenizer:
                raise Refusal(
                    Reason.CONFIG_INVALID,
                    "the base model has no tokenizer, so text cannot be trained on; add its "
                    "tokenizer.json to the checkpoint",
                )
            content = path.read_bytes()
            tokenizer = Tokenizer.from_buffer(content)
            template = info.compiled(lambda: TEMPLATE_TIME)
        except Refusal as refusal:
            raise Refusal(Reason.CONFIG_INVALID, refusal.message) from refusal
        except Exception as error:  # the library raises plain Exception
            raise Refusal(Reason.CONFIG_INVALID, f"cannot read {path}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end = None if template is None else end_of_turn(tokenizer, template)
        ends = [*eos_token_ids, *(() if end is None else (end,))]
        self.eos_ids = tuple(dict.fromkeys(ends))
        if not self.eos_ids:
            raise Refusal(
                Reason.CONFIG_INVALID,
                "the base model has no end-of-text token, so an adapter could not learn to stop; "
                "set eos_token_id in its config.json",
            )
        usual = tokenizer.token_to_id(info.special_tokens.get("eos_token", ""))
        self.eos = next((id_ for id_ in self.eos_ids if id_ == usual), self.eos_ids[0])
        self.tokenizer_digest = hashlib.sha256(content).hexdigest()
        source = info.chat_template
        self.template_digest = hashlib.sha256(source.encode()).hexdigest() if source else ""
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(
            tokenizer, info, template, special_tokens_in_messages=special_tokens_in_messages
        )
        # One int object per id: a data set has millions of tokens.
        self._ids = {token: token for token in range(tokenizer.get_vocab_size())}
        added = tokenizer.get_added_tokens_decoder()
        self._special = {id_ for id_, token in added.items() if token.special}

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._encoder.template is not None

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template by which conversations are rendered."""
        return self._encoder.template

    def ids(self, text: str) -> list[int]:
        """Tokenises a text without adding special tokens; those spelt out in it are recognised."""
        return self._shared(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt_ids(self, text: str) -> list[int]:
        """Tokenises a plain prompt as the server does: with BOS if the base model uses it."""
        return self._shared(self._encoder.encode(text))

    def conversation(
        self, messages: Sequence[Message], options: ChatOptions = DEFAULTS
    ) -> MarkedChat:
        """A conversation to be rendered and encoded as the server does.

        Raises:
            TextRefused: the base model has no template.
        """
        self._check_template()
        return self._encoder.conversation(messages, options)

    def prompt(
        self, messages: Sequence[Message], options: ChatOptions = DEFAULTS
    ) -> RenderedPrompt:
        """Renders and encodes a conversation as the server does. Raises TextRefused."""
        self._check_template()
        prompt = self._encoder.prompt(messages, options)
        return RenderedPrompt(prompt.text, self._shared(prompt.token_ids))

    def chat_ids(self, chat: MarkedChat, text: str) -> list[int]:
        """Tokenises a text that was rendered from a conversation, or a part of one."""
        return self._shared(chat.ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens without special ones, as a client of the server gets it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, token: int) -> str:
        """Returns the vocabulary's spelling of an id, or ""."""
        return self._tokenizer.id_to_token(token) or ""

    def is_special(self, token: int) -> bool:
        """Returns whether `decode` skips the token."""
        return token in self._special

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns each token's part of the text, special tokens included.

        A character of several tokens belongs to its last one; the others have "".
        """
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token) or "" for token in ids]

    def _check_template(self) -> None:
        if not self.has_template:
            raise TextRefused(
                "the base model has no chat template, so messages cannot be used; write prompt and "
                "completion as strings, or text"
            )

    def _shared(self, ids: list[int]) -> list[int]:
        return [self._ids.setdefault(token, token) for token in ids]
