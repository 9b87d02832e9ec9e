"""A conversation rendered with the base model's own chat template, in a sandbox.

The template comes with the base model, which is the operator's; adapters and requests bring none.
It is jinja2 as Hugging Face's `apply_chat_template` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED: Final = 4 << 20
"""Characters; a template that makes more of a request is refused."""


class TextRefused(Exception):
    """What was sent cannot become tokens; the message is safe to show to a client."""


class ChatTemplate:
    """A compiled template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, up to where the assistant's next turn begins.

        Raises TextRefused.
        """
        pieces, size = [], 0
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [dict(m) for m in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
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


class _TemplateRefusal(Exception):
    """What a template raises with `raise_exception`."""


def _refuse(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # the template's local time, as transformers gives it


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
