"""From prompts and conversations to token ids, in the one way that server and trainer share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Final

from tokenizers import Encoding, Tokenizer

from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate, TextRefused
from loraplex_model.checkpoints.control.aliases import AliasedTokenizer
from loraplex_model.checkpoints.control.marks import Marks, strings_of
from loraplex_model.checkpoints.control.spellings import Spellings, control_tokens, separable
from loraplex_model.checkpoints.tokenizer import TokenizerInfo

Message = Mapping[str, Any]

DEFAULTS: Final = ChatOptions()

_KEPT: Final = 16
"""Largest number of sets of control tokens that are kept ready."""

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
    `apply_chat_template`. Control tokens spelt out in messages, tools and variables are encoded as
    text. All methods may be called from several threads.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        info: TokenizerInfo,
        template: ChatTemplate | None,
        *,
        special_tokens_in_messages: bool = False,
    ) -> None:
        """
        Args:
            template: the base model's, used where a call names none.
            special_tokens_in_messages: control tokens in messages are recognised, not text.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._before, self._after = _added_around(tokenizer)
        self._tokens = {} if special_tokens_in_messages else separable(tokenizer)
        self._spellings = Spellings(self._tokens)
        unknown = info.special_tokens.get("unk_token")
        self._forgeable = frozenset(
            tokenizer.token_to_id(spelling) for spelling in self._tokens if spelling != unknown
        )
        self._controls: dict[frozenset[str], Spellings] = {}
        self._aliased: AliasedTokenizer | None = None
        self._lock = Lock()

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
        ids = _encode(self._tokenizer, text, add_special_tokens=True)
        ids = ids[: len(ids) - len(self._after)]
        size = len(self._before)
        return ids[size:] if size and ids[size : 2 * size] == self._before else ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text that nothing is put in front of."""
        return _encode(self._tokenizer, text)

    def encode_chat(
        self,
        messages: Sequence[Message],
        options: ChatOptions = DEFAULTS,
        template: ChatTemplate | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Raises TextRefused."""
        return self.prompt(messages, options, template).token_ids

    def prompt(
        self,
        messages: Sequence[Message],
        options: ChatOptions = DEFAULTS,
        template: ChatTemplate | None = None,
    ) -> RenderedPrompt:
        """Text and token ids of a conversation. Raises TextRefused."""
        chat = self.conversation(messages, options, template)
        text = chat.render(chat.messages, chat.options)
        return RenderedPrompt(chat.plain(text), chat.ids(text))

    def conversation(
        self,
        messages: Sequence[Message],
        options: ChatOptions = DEFAULTS,
        template: ChatTemplate | None = None,
    ) -> MarkedChat:
        """A conversation whose parts can be rendered and encoded apart, as training needs them.

        Raises TextRefused if there is no template.
        """
        chosen = template or self._template
        if chosen is None:
            raise TextRefused("the base model has no chat template")
        return MarkedChat(self, chosen, self._controls_of(chosen), messages, options)

    def ids(self, text: str, marks: Marks) -> list[int]:
        """Token ids of a rendered text with marks, to which no special tokens are added."""
        if not marks.are_in(text):
            ids = _encode(self._tokenizer, text)
            forgeable = sum(token in self._forgeable for token in ids)
            if not forgeable or forgeable <= self._spellings.count(text):
                return ids
            # A control token that is not spelt out: the tokenizer's normaliser or model made it.
        with self._lock:
            if self._aliased is None:
                self._aliased = AliasedTokenizer(self._tokenizer, self._tokens)
        return self._aliased.encode(text, marks)

    def _controls_of(self, template: ChatTemplate) -> Spellings:
        """The control tokens of a template; most templates have the same."""
        words = control_tokens(self._tokens, template.source)
        found = self._controls.get(words)
        if found is None:
            if len(self._controls) >= _KEPT:
                self._controls.clear()
            found = self._controls[words] = Spellings(words)
        return found


class MarkedChat:
    """A conversation whose control tokens are marked.

    Texts rendered from it keep the marks, so they can be compared, cut and joined before they are
    encoded.

    Attributes:
        messages: the messages, marked.
        options: the options, with tools and variables marked.
        is_marked: whether there is a mark in them.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        template: ChatTemplate,
        controls: Spellings,
        messages: Sequence[Message],
        options: ChatOptions,
    ) -> None:
        """Marks the `controls` in messages, tools and variables. Raises TextRefused."""
        self._encoder = encoder
        self._template = template
        self._controls = controls
        strings = [*strings_of([messages, options.tools, options.variables]), template.source]
        self._marks = Marks.unused_in(strings)
        try:
            self.messages: Sequence[Message] = self._marks.mark_all(messages, controls)
            self.options = replace(
                options,
                tools=self._marks.mark_all(options.tools, controls),
                variables=self._marks.mark_all(options.variables, controls),
            )
            marked = strings_of([self.messages, self.options.tools, self.options.variables])
            self.is_marked = any(map(self._marks.are_in, marked))
        except RecursionError as error:
            raise TextRefused("the conversation is nested too deeply") from error

    def mark(self, text: str) -> str:
        """A further string, marked; it must be a part of a string of the conversation."""
        return self._marks.mark(text, self._controls)

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """Renders marked messages; the text keeps the marks. Raises TextRefused."""
        return self._template.render(messages, options)

    def plain(self, text: str) -> str:
        """A text without marks."""
        return self._marks.remove(text)

    def ids(self, text: str) -> list[int]:
        """Token ids of a marked text, to which no special tokens are added."""
        return self._encoder.ids(text, self._marks)


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    # The batch call releases the GIL; the single one does not.
    [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer's post-processor puts before and after a text."""
    spellings = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    for text in (*_PROBES, *spellings):
        encoded: Encoding = tokenizer.encode(text)
        own = [at for at, added in enumerate(encoded.special_tokens_mask) if not added]
        if own:
            return encoded.ids[: own[0]], encoded.ids[own[-1] + 1 :]
    return [], []
