"""Rendering a conversation with a chat template, as Hugging Face's `apply_chat_template` does.

The template comes from the base model or the server's operator, or from an adapter if the operator
allows that, never from a request. It runs in the sandbox of `chat_sandbox`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Final

from jinja2.environment import Template

from loraplex_model.checkpoints.chat_messages import Abilities, adapted, probe
from loraplex_model.checkpoints.chat_sandbox import (
    TextRefused,
    TooMuchWork,
    begin,
    compile_template,
    end,
)

__all__ = ["ChatOptions", "ChatTemplate", "TextRefused"]

MAX_RENDERED: Final = 4 << 20
"""Largest number of characters of a rendered conversation; longer ones are refused."""

_SET: Final = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that every rendering sets."""

_END: Final = "\U0001fffe "
"""Marks the end of the message that is continued: a noncharacter, and a space to see whether the
template keeps white space there."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered.

    Attributes:
        add_generation_prompt: whether the assistant's next message is opened at the end. None: yes,
            unless the conversation is continued.
        continue_final_message: whether the prompt ends with the text of the last message, so that
            the completion continues it. None: yes, if the last message is the assistant's and
            `add_generation_prompt` is not True.
        tools: descriptions of functions that the model may call; () for none.
        variables: further variables of the template (`chat_template_kwargs`).
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """A compiled chat template with the model's special tokens.

    Attributes:
        source: the template's Jinja source.
        sha256: SHA-256 (hex) of the source.
        takes_tools: whether the template reads `tools`.
        variables: names of the variables that `ChatOptions.variables` may set, sorted: those that
            the template reads before it sets them itself, and that are not set anyway.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        clock: Callable[[], datetime] = datetime.now,
        tool_source: str | None = None,
    ) -> None:
        """
        Args:
            clock: returns the local time that the template may print.
            tool_source: another template, which is used when tools are given.

        Raises jinja2.TemplateError.
        """
        self.source = source if tool_source is None else f"{source}{tool_source}"
        self.sha256 = hashlib.sha256(self.source.encode()).hexdigest()
        self._special_tokens = dict(special_tokens)
        self._template, reads, wants = compile_template(source, clock)
        self._with_tools = self._template
        if tool_source is not None:
            self._with_tools, reads, more = compile_template(tool_source, clock)
            wants |= more
        self.takes_tools = "tools" in reads
        self.variables = tuple(sorted(wants - {*_SET, *self._special_tokens}))

    @cached_property
    def abilities(self) -> Abilities:
        """What the template does with messages of other kinds than text by the usual roles."""
        return probe(self._run, self.takes_tools)

    def render(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> str:
        """The prompt of a conversation.

        Raises TextRefused for what the template refuses, leaves out or does not read.
        """
        options = options or ChatOptions()
        self._check(options)
        continues = _continues(messages, options)
        chat = adapted(messages, self.abilities)
        kept = _mark_end(chat) if continues else ""
        opens = options.add_generation_prompt
        text = self._run(
            chat,
            list(options.tools) or None,
            not continues if opens is None else opens,
            options.variables,
        )
        return _cut(text, kept) if continues else text

    def _check(self, options: ChatOptions) -> None:
        if options.tools and not self.takes_tools:
            raise TextRefused(
                "the chat template does not read tools, so the model would not see them"
            )
        unknown = sorted(options.variables.keys() - set(self.variables))
        if unknown:
            known = ", ".join(self.variables) or "none"
            raise TextRefused(
                f"the chat template has no variable {unknown[0]!r} that can be set; it has: {known}"
            )

    def _run(
        self,
        chat: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        template: Template = self._with_tools if tools else self._template
        given: dict[str, Any] = {
            **self._special_tokens,
            **variables,
            "messages": chat,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, size = [], 0
        begin(template)
        try:
            for piece in template.generate(given):
                size += len(piece)
                if size > MAX_RENDERED:
                    raise TextRefused("the rendered conversation is too long")
                pieces.append(piece)
        except TextRefused:
            raise
        except (MemoryError, RecursionError) as error:
            raise TooMuchWork from error
        except Exception as error:  # not shown, unlike the template's own messages
            text = "the model's chat template does not accept this conversation"
            raise TextRefused(text) from error
        finally:
            end(template)
        return "".join(pieces)


def _continues(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> bool:
    """Whether the last message is continued. Raises TextRefused for options that exclude it."""
    wanted, opens = options.continue_final_message, options.add_generation_prompt
    if wanted and opens:
        raise TextRefused(
            "add_generation_prompt and continue_final_message exclude each other: a new message "
            "cannot be opened and the last one continued"
        )
    last = messages[-1] if messages else {}
    if wanted is None:
        wanted = opens is None and last.get("role") == "assistant"
    if wanted and not isinstance(last.get("content"), str | list):
        raise TextRefused(
            "the last message has no text to continue; add the answers of its tool calls, or set "
            "add_generation_prompt to open a new message"
        )
    return wanted


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Marks the end of the last message's text, in place; returns the text."""
    content = chat[-1]["content"]
    if isinstance(content, str):
        chat[-1]["content"] = content + _END
        return content
    for part in reversed(content):
        if isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _END
            return text
    raise TextRefused("the last message has no text to continue")


def _cut(text: str, kept: str) -> str:
    """The rendered text up to the marked end of the last message, whose text was `kept`."""
    at = text.rfind(_END.strip())
    if at < 0 or kept.strip() not in text:
        raise TextRefused(
            "the chat template does not render the text of the last message as it is, so it cannot "
            "be continued"
        )
    text = text[:at] if text.startswith(_END, at) else text[:at].rstrip()
    # A template may write the message several times.
    return text.replace(kept + _END, kept)
