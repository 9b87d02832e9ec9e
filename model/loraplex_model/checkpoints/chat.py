"""Rendering a conversation with the base model's chat template, in a sandbox.

The template comes from the base model, which the operator has chosen, never from adapters or
requests. It is run with jinja2 as in Hugging Face's `apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED: Final = 4 << 20
"""Largest number of characters of a rendered conversation; longer ones are refused."""


class TextRefused(Exception):
    """A text or conversation cannot be turned into tokens; the message may be shown to a client."""


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
    """A compiled chat template with the model's special tokens."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`clock` returns the local time that the template may print."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: clock().strftime(form)
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = True) -> str:
        """The prompt of a conversation, including the beginning of the assistant's next turn.

        Without `generation_prompt` it ends with the last turn. Raises TextRefused.
        """
        pieces, size = [], 0
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [dict(m) for m in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > MAX_RENDERED:
                    raise TextRefused("the rendered conversation is too long")
                pieces.append(piece)
        except TextRefused:
            raise
        except Exception as error:  # not shown, unlike the template's own messages
            text = "the model's chat template does not accept this conversation"
            raise TextRefused(text) from error
        return "".join(pieces)


class _Generation(Extension):
    """The tag `{% generation %}` around the assistant's own words, which are rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  what jinja2 reads

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # variables set inside are local, as in transformers


def _refuse(message: str) -> NoReturn:
    """The function `raise_exception` of templates, whose messages are for the caller."""
    raise TextRefused(f"the model's chat template refuses: {message}")


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
