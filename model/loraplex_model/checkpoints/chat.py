"""A conversation rendered with the base model's own chat template, in a sandbox.

The template comes with the base model, which is the operator's; adapters and requests bring none.
It is jinja2 as Hugging Face's `apply_chat_template` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED: Final = 4 << 20
"""Characters; a template that makes more of a request is refused."""


class TextRefused(Exception):
    """What was sent cannot become tokens; the message is safe to show to a client."""


class ChatTemplate:
    """A compiled template with the special tokens it may name."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`clock` is the template's local time; transformers gives it that of now."""

        def now(form: str) -> str:
            return clock().strftime(form)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = True) -> str:
        """The prompt of a conversation, up to where the assistant's next turn begins.

        Without `generation_prompt` only up to the end of the last turn. Raises TextRefused.
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
        except _TemplateRefusal as error:
            # What the template itself says is for the caller's eyes; what else goes wrong is not.
            raise TextRefused(f"the model's chat template refuses: {error}") from error
        except TextRefused:
            raise
        except Exception as error:
            text = "the model's chat template does not take this conversation"
            raise TextRefused(text) from error
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}`, with which templates mark the assistant's own words: they stand as is."""

    tags = {"generation"}  # noqa: RUF012  what jinja2 reads

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # what is set within is not seen after, as there


class _TemplateRefusal(Exception):
    """What a template raises with `raise_exception`."""


def _refuse(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
