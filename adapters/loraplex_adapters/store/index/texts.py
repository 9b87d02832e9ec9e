"""What a version brings for text besides its weights: a chat template, and end tokens.

Both belong to the version and never change; the same content with another template is another
version. Templates are stored once each, by the SHA-256 of their source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_adapters.store.index import schema

MAX_TEMPLATE_BYTES: Final = 256 << 10
MAX_EOS_TOKENS: Final = 64

_texts, _templates = schema.version_texts.c, schema.chat_templates.c


@dataclass(frozen=True, slots=True)
class VersionText:
    """The chat template and the end tokens of a version, in place of the base model's.

    Attributes:
        chat_template: Jinja source; "" for the base model's template.
        eos_token_ids: distinct token ids that end a completion; () for the base model's.
    """

    chat_template: str = ""
    eos_token_ids: tuple[int, ...] = ()

    @staticmethod
    def of(chat_template: str, eos_token_ids: Sequence[int]) -> VersionText:
        """Returns the value with each end token once, in the given order."""
        return VersionText(chat_template, tuple(dict.fromkeys(eos_token_ids)))

    @property
    def template_sha256(self) -> str:
        """SHA-256 (hex) of the template's source; "" without one."""
        source = self.chat_template
        return hashlib.sha256(source.encode()).hexdigest() if source else ""

    def check(self, vocab_size: int) -> None:
        """Raises Refusal(FIELD_INVALID) for end tokens outside the vocabulary, or for a value that
        is too large.

        The template itself is not compiled here.
        """
        problems = []
        if len(self.chat_template.encode()) > MAX_TEMPLATE_BYTES:
            text = f"has more than {MAX_TEMPLATE_BYTES} bytes"
            problems.append(Problem("chat_template", f"chat_template {text}"))
        if len(self.eos_token_ids) > MAX_EOS_TOKENS:
            text = f"has more than {MAX_EOS_TOKENS} tokens"
            problems.append(Problem("eos_token_ids", f"eos_token_ids {text}"))
        outside = [token for token in self.eos_token_ids if not 0 <= token < vocab_size]
        if outside:
            text = f"{outside[0]} is not in the vocabulary of {vocab_size} tokens"
            problems.append(Problem("eos_token_ids", text))
        if problems:
            raise Refusal.listing(Reason.FIELD_INVALID, problems)


def put(connection: sa.Connection, name: str, version: int, text: VersionText) -> None:
    """Records the text of a new version."""
    if text == VersionText():
        return
    sha256 = text.template_sha256
    if sha256:
        known = sa.select(_templates.sha256).where(_templates.sha256 == sha256)
        if connection.execute(known).first() is None:
            row = {"sha256": sha256, "source": text.chat_template}
            connection.execute(sa.insert(schema.chat_templates).values(row))
    connection.execute(
        sa.insert(schema.version_texts).values(
            name=name, version=version, template=sha256, eos_token_ids=list(text.eos_token_ids)
        )
    )


def template(connection: sa.Connection, sha256: str) -> str:
    """Returns the source of a template.

    Raises Refusal(ADAPTER_CORRUPT) if it is missing or is not what was registered.
    """
    query = sa.select(_templates.source).where(_templates.sha256 == sha256)
    source = connection.execute(query).scalar()
    if source is None or VersionText(str(source)).template_sha256 != sha256:
        message = "the adapter's chat template in the store's index is missing or damaged"
        raise Refusal(Reason.ADAPTER_CORRUPT, message)
    return str(source)


def drop(connection: sa.Connection, versions: Sequence[tuple[str, int]]) -> None:
    """Removes the texts of versions, and templates that no version has any more."""
    for name, version in versions:
        of_version = sa.and_(_texts.name == name, _texts.version == version)
        connection.execute(sa.delete(schema.version_texts).where(of_version))
    used = sa.exists().where(_texts.template == _templates.sha256)
    connection.execute(sa.delete(schema.chat_templates).where(~used))
