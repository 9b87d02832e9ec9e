"""Notes about files beside an adapter's two that have no effect, for whoever registers it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

MAX_NOTED_FILES: Final = 1000
"""Most names of a directory that are compared."""

TEMPLATE_FILES: Final = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "generation_config.json"),
)


def folder_notes(names: Collection[str], has_template: bool = False) -> list[str]:
    """Returns a sentence for each kind of file in an adapter's directory that is not used.

    `names` are the directory's files; `has_template` is True if the adapter is registered with a
    chat template of its own.
    """
    notes = []
    templates = [name for name in TEMPLATE_FILES if name in names]
    if templates and not has_template:
        notes.append(
            f"{templates[0]} is not used: conversations are rendered with the chat template of the "
            "base model; to use the adapter's, register it with its chat template "
            "(--chat-template), which the server's operator must allow"
        )
    if tokenizer := [name for name in TOKENIZER_FILES if name in names]:
        notes.append(
            f"{', '.join(tokenizer)} {'is' if len(tokenizer) == 1 else 'are'} not used: text is "
            "tokenised with the tokenizer of the base model, and its tokens end an answer unless "
            "the adapter is registered with end tokens of its own (--eos-token-id)"
        )
    return notes
