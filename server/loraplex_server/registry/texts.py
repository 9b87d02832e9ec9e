"""Chat templates and end tokens that adapters bring, in place of the base model's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from jinja2 import TemplateError
from loraplex_adapters.store import Record, VersionText
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.chat import ChatTemplate, TextRefused

from loraplex_server.runtime.lanes import Lane

T = TypeVar("T")

COMPILED: Final = 64
"""Templates that are kept compiled."""

_REFUSED: Final = (
    "chat templates of adapters are not allowed on this server; its operator can allow them with "
    "--adapter-chat-templates"
)


class AdapterTexts:
    """Compiles the chat templates of adapters' versions.

    A mix uses a template, or end tokens, only if all its adapters have the same; otherwise the base
    model's.
    """

    def __init__(
        self, special_tokens: Mapping[str, str] | None = None, allowed: bool = False
    ) -> None:
        """`allowed` is the setting `adapter_chat_templates`."""
        self._special_tokens = dict(special_tokens or {})
        self._allowed = allowed
        self._compiled: OrderedDict[str, ChatTemplate] = OrderedDict()

    def check(self, text: VersionText) -> None:
        """Checks what a version is to be registered with. Takes up to a second for a long template.

        Raises Refusal(FIELD_INVALID, field "chat_template"): templates are not allowed, or it
        does not compile, or it needs too much work.
        """
        if text.chat_template:
            if not self._allowed:
                raise Refusal(Reason.FIELD_INVALID, _REFUSED, "chat_template")
            self._compile(text.chat_template)

    async def template(
        self, records: Sequence[Record], read: Callable[[str], Awaitable[str]], lane: Lane
    ) -> ChatTemplate | None:
        """The template of a request with these adapters; None for the base model's.

        `read` returns the source of a template by its SHA-256; it is compiled in a thread of
        `lane`. Raises Refusal(ADAPTER_UNSUPPORTED) if templates of adapters are not allowed any
        more, or if this version does not compile it, and ADAPTER_CORRUPT if the index has lost it.
        """
        sha256 = _common([record.chat_template_sha256 for record in records], "")
        if not sha256:
            return None
        if not self._allowed:
            message = f"the adapter has a chat template of its own, and {_REFUSED}; send a prompt"
            raise Refusal(Reason.ADAPTER_UNSUPPORTED, message, "messages")
        found = self._compiled.get(sha256)
        if found is None:
            found = await lane.run(self._recompile, await read(sha256))
            self._compiled[sha256] = found
            if len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(sha256)
        return found

    def _recompile(self, source: str) -> ChatTemplate:
        """A registered template, which another version of this server compiled."""
        try:
            return self._compile(source)
        except Refusal as error:
            message = f"{error.message}; register the adapter with another one, or send a prompt"
            raise Refusal(Reason.ADAPTER_UNSUPPORTED, message, "messages") from error

    def _compile(self, source: str) -> ChatTemplate:
        try:
            template = ChatTemplate(source, self._special_tokens)
            _ = template.abilities  # found by rendering, which must not happen on the event loop
            return template
        except TemplateError as error:
            message = f"the chat template does not compile: {error}"
            raise Refusal(Reason.FIELD_INVALID, message, "chat_template") from error
        except TextRefused as error:
            message = "the chat template needs too much work or memory for two short messages"
            raise Refusal(Reason.FIELD_INVALID, message, "chat_template") from error


def end_tokens(records: Sequence[Record], base: Sequence[int]) -> Sequence[int]:
    """The tokens that end a completion with these adapters; `base` are those of the base model."""
    return _common([record.eos_token_ids for record in records], ()) or base


def _common(values: Sequence[T], none: T) -> T:
    """The value that all have in common; `none` if there is none."""
    return values[0] if values and all(value == values[0] for value in values) else none
