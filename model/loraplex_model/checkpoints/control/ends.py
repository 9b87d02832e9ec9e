"""Tokens that end an answer, collected from all places that name one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from jinja2 import TemplateError

from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate, TextRefused
from loraplex_model.checkpoints.control.spellings import Spellings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_QUESTION: Final = "Which colour is the sky?"
_ANSWER: Final = "It is mostly blue today."

_log = logging.getLogger(__name__)


def named_end_tokens(name: str, config: Mapping[str, Any], vocab_size: int) -> list[int]:
    """The ids of `eos_token_id` in a configuration: one, a list, or none.

    A value that is no token of the vocabulary could never be generated; it is left out with a
    warning.

    Args:
        name: the configuration's name in the warning.
    """
    value = config.get("eos_token_id")
    ids = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < vocab_size:
            ids.append(item)
        elif item is not None:
            _log.warning(
                "eos_token_id %r of the base model's %s is left out; it is no token id below %d",
                item,
                name,
                vocab_size,
            )
    return ids


def end_tokens(
    named: Sequence[int],
    tokenizer: Tokenizer,
    special_tokens: Mapping[str, str],
    template: str | None,
    vocab_size: int,
) -> tuple[int, ...]:
    """All tokens that end an answer, in this order and without repetition.

    Args:
        named: those of the configurations.
        special_tokens: the tokenizer's, of which "eos_token" ends an answer.
        template: source of the chat template, whose end of an assistant's turn ends an answer.
    """
    ids: list[int | None] = list(named)
    ids.append(tokenizer.token_to_id(special_tokens.get("eos_token", "")))
    if template is not None:
        with suppress(TemplateError):  # it is refused where conversations are rendered
            ids.append(end_of_turn(tokenizer, ChatTemplate(template, special_tokens)))
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None and id_ < vocab_size))


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The special token that a template writes directly after an assistant's words, or None.

    It is found by rendering a short conversation. A model that follows the template writes this
    token after each answer, whatever its configuration names.
    """
    talk = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = template.render(
            talk, ChatOptions(add_generation_prompt=False, continue_final_message=False)
        )
    except TextRefused:
        return None
    _, found, after = text.rpartition(_ANSWER)
    added = tokenizer.get_added_tokens_decoder().items()
    special = {token.content: id_ for id_, token in added if token.special}
    end = Spellings(special).at_start_of(after) if found else None
    return None if end is None else special[end]
