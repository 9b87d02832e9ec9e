"""The base's text side as training needs it: exactly what the server makes of the same words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from jinja2 import TemplateError
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.chat import ChatTemplate, TextRefused
from loraplex_model.checkpoints.tokenizer import TOKENIZER, TokenizerInfo
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

TEMPLATE_TIME: Final = datetime(2024, 7, 26)
"""What a template that writes today's date is told: a data set must not change overnight."""


class BaseText:
    """A base's tokenizer and chat template.

    Attributes:
        eos: the id with which an answer or a text ends where the template writes none.
        eos_ids: every id that ends a generation.
        template_digest: SHA-256 (hex) of the chat template's source, "" if there is none.
        tokenizer_digest: SHA-256 (hex) of tokenizer.json.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        info: TokenizerInfo,
        eos_token_ids: Sequence[int],
        tokenizer_digest: str,
    ) -> None:
        """Raises Refusal (CONFIG_INVALID); see `open`."""
        self.eos_ids = tuple(eos_token_ids)
        if not self.eos_ids:
            raise Refusal(
                Reason.CONFIG_INVALID,
                "the base model names no token that ends a text, so an adapter could not learn to "
                "stop; set eos_token_id in its config.json",
            )
        self.eos = self.eos_ids[0]
        self.tokenizer_digest = tokenizer_digest
        source = info.chat_template
        self.template_digest = hashlib.sha256(source.encode()).hexdigest() if source else ""
        self._tokenizer = tokenizer
        self._bos = info.bos_token_id if info.adds_bos else None
        self._chat = _template(info)
        # One object for each id: a data set is millions of them.
        self._ids = {token: token for token in range(tokenizer.get_vocab_size())}
        added = tokenizer.get_added_tokens_decoder()
        self._special = {id_ for id_, token in added.items() if token.special}

    @classmethod
    def open(cls, directory: Path, eos_token_ids: Sequence[int]) -> BaseText:
        """Reads `LoadedBase.directory`.

        Args:
            eos_token_ids: `BaseWeights.eos_token_ids`.

        Raises:
            Refusal: CONFIG_INVALID, for a base without tokenizer, EOS or a template that works.
        """
        path = directory / TOKENIZER
        try:
            info = TokenizerInfo.read(directory)
            if not info.has_tokenizer:
                raise Refusal(
                    Reason.CONFIG_INVALID,
                    "the base model has no tokenizer, so text cannot be trained on; add its "
                    "tokenizer.json to the checkpoint",
                )
            content = path.read_bytes()
            tokenizer = Tokenizer.from_buffer(content)
        except Refusal as refusal:
            raise Refusal(Reason.CONFIG_INVALID, refusal.message) from refusal
        except Exception as error:  # the library raises bare exceptions
            raise Refusal(Reason.CONFIG_INVALID, f"cannot read {path}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, info, eos_token_ids, hashlib.sha256(content).hexdigest())

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat is not None

    def ids(self, text: str) -> list[int]:
        """Its tokens; no special token is added, but one that the text spells out is one."""
        return self._encode(text, special=False)

    def prompt_ids(self, text: str) -> list[int]:
        """What the server makes of a request's plain `prompt`: with BOS where the base has it.

        A text that begins with BOS already gets no second one.
        """
        ids = self._encode(text, special=True)
        return ids[1:] if self._bos is not None and ids[:2] == [self._bos] * 2 else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones, as a client of the server gets it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, token: int) -> str:
        """How the vocabulary spells one id, "" if it has none."""
        return self._tokenizer.id_to_token(token) or ""

    def is_special(self, token: int) -> bool:
        """Whether it is one that `decode` leaves out."""
        return token in self._special

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's share of the text, special tokens too.

        A character of several tokens stands with its last one; the others' share is "".
        """
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token) or "" for token in ids]

    def render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> str:
        """A conversation as the server renders it, with the opening of the next answer or not.

        Raises:
            TextRefused: the base has no template, or the template refuses; says why.
        """
        if self._chat is None:
            raise TextRefused(
                "the base model has no chat template, so it takes no messages; give prompt and "
                "completion as strings, or text"
            )
        return self._chat.render(messages, generation_prompt)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        return [self._ids.setdefault(token, token) for token in ids]


def _template(info: TokenizerInfo) -> ChatTemplate | None:
    if info.chat_template is None:
        return None
    try:
        return ChatTemplate(info.chat_template, info.special_tokens, lambda: TEMPLATE_TIME)
    except TemplateError as error:
        raise Refusal(
            Reason.CONFIG_INVALID, f"the base model's chat template does not compile: {error}"
        ) from error
