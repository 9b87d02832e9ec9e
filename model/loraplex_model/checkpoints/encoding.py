"""From prompts and conversations to token ids, in the one way that server and trainer share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Encoding, Tokenizer

from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate, TextRefused
from loraplex_model.checkpoints.tokenizer import TokenizerInfo

Message = Mapping[str, Any]

_PROBES: Final = ("a", "0", " a", ".")
"""Texts by which the tokens that a tokenizer adds around a text are found."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation as the model gets it.

    Attributes:
        text: what the chat template returned.
        token_ids: its tokens.
    """

    text: str
    token_ids: list[int]


class PromptEncoder:
    """Encodes prompts and conversations with a base model's tokenizer and chat template.

    A plain prompt begins with the tokens that the tokenizer puts before a text (BOS), once, even if
    the prompt spells them out; what the tokenizer appends to a text (EOS) is left out, since the
    model is to continue the prompt. Special tokens spelt out in a plain prompt are recognised.

    A rendered conversation contains its special tokens, so none are added, as in Hugging Face's
    `apply_chat_template`. Control tokens spelt out in messages are encoded as text, unless
    `special_tokens_in_messages`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        info: TokenizerInfo,
        template: ChatTemplate | None,
        *,
        special_tokens_in_messages: bool = False,
    ) -> None:
        """`template` is the base model's, used where a call names none."""
        self._tokenizer = tokenizer
        self._template = template
        self._info = info
        self._special_tokens_in_messages = special_tokens_in_messages
        self._before, self._after = _added_around(tokenizer)

    @property
    def template(self) -> ChatTemplate | None:
        """The base model's template."""
        return self._template

    @property
    def bos(self) -> int | None:
        """The token that begins every plain prompt; None if the tokenizer adds none."""
        return self._before[0] if self._before else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""
        ids = self._ids(text, add_special_tokens=True)
        ids = ids[: len(ids) - len(self._after)]
        size = len(self._before)
        return ids[size:] if size and ids[size : 2 * size] == self._before else ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        options: ChatOptions = ChatOptions(),  # noqa: B008  frozen
        template: ChatTemplate | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Raises TextRefused."""
        return self.prompt(messages, options, template).token_ids

    def prompt(
        self,
        messages: Sequence[Message],
        options: ChatOptions = ChatOptions(),  # noqa: B008  frozen
        template: ChatTemplate | None = None,
    ) -> RenderedPrompt:
        """Text and token ids of a conversation. Raises TextRefused."""
        chat = self.conversation(messages, options, template)
        text = chat.render(chat.messages, chat.options)
        return RenderedPrompt(chat.plain(text), chat.ids(text))

    def conversation(
        self,
        messages: Sequence[Message],
        options: ChatOptions = ChatOptions(),  # noqa: B008  frozen
        template: ChatTemplate | None = None,
    ) -> Conversation:
        """A conversation whose parts are rendered and encoded apart, as training does.

        Raises TextRefused if there is no template.
        """
        chosen = template or self._template
        if chosen is None:
            raise TextRefused("the base model has no chat template")
        return Conversation(self, chosen, messages, options)

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        # The batch call releases the GIL; the single one does not.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)


class Conversation:
    """A conversation whose control tokens are marked, to be rendered in whole or in part.

    Rendered texts keep the marks, so they can be compared, cut and joined before they are encoded.

    Attributes:
        messages: the messages, marked.
        options: the options, with tools and variables marked.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        template: ChatTemplate,
        messages: Sequence[Message],
        options: ChatOptions,
    ) -> None:
        self._encoder = encoder
        self._template = template
        self.messages = messages
        self.options = options

    def mark(self, text: str) -> str:
        """A further string of this conversation, marked: a part of a string of its messages."""
        return text

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """Renders marked messages; the text keeps the marks. Raises TextRefused."""
        return self._template.render(messages, options)

    def plain(self, text: str) -> str:
        """A text without marks."""
        return text

    def ids(self, text: str) -> list[int]:
        """Token ids of a marked text, to which no special tokens are added."""
        return self._encoder._ids(text)


def _added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer's post-processor puts before and after a text."""
    spellings = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    for text in (*_PROBES, *spellings):
        encoded: Encoding = tokenizer.encode(text)
        own = [at for at, added in enumerate(encoded.special_tokens_mask) if not added]
        if own:
            return encoded.ids[: own[0]], encoded.ids[own[-1] + 1 :]
    return [], []
