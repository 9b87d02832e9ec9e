"""The form that a client wants a completion to have, and the answer to its check."""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec


class FormKind(StrEnum):
    """The kinds of forms. The values are the names of the API's fields."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICES = "choices"
    GRAMMAR = "grammar"


class StructureForm(msgspec.Struct, frozen=True):
    """What the text of a completion must be: one text of the kind, or the texts to choose from."""

    kind: FormKind
    texts: list[str]

    @property
    def is_json(self) -> bool:
        """Whether a completion is JSON."""
        return self.kind in (FormKind.JSON_SCHEMA, FormKind.JSON_OBJECT)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the form."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).digest()


class CheckedForm(msgspec.Struct, frozen=True):
    """A form's grammar, or what is wrong with the form, for its sender; the other is ""."""

    grammar: str = ""
    problem: str = ""
