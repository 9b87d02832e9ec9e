"""Label selectors: conditions on an adapter's labels, written as Kubernetes writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import sqlalchemy as sa
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store.index import schema
from loraplex_adapters.store.index.labels import MAX_LABELS, MAX_VALUE, check_keys

MAX_SELECTOR: Final = 4096
"""Most characters of a selector."""

_PLAIN: Final = re.compile(r"[^\s=!,()]*")
"""A value that needs no parentheses."""

_TERM: Final = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<absent_key>[^\s=!,()]+)"
    r"|(?P<key>[^\s=!,()]+)"
    r"(?:\s*(?P<equals>==?|!=)\s*(?P<value>[^\s=!,()]*)"
    r"|\s+(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?)\s*"
)


class Operator(Enum):
    """How a term compares the value of a label."""

    IN = "in"
    NOT_IN = "notin"
    EXISTS = "exists"
    ABSENT = "!"


@dataclass(frozen=True, slots=True)
class Term:
    """One condition. `NOT_IN` is also met by adapters without the label, as in Kubernetes."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet the condition."""
        match self.operator:
            case Operator.IN:
                return labels.get(self.key) in self.values
            case Operator.NOT_IN:
                return labels.get(self.key) not in self.values
            case Operator.EXISTS:
                return self.key in labels
            case Operator.ABSENT:
                return self.key not in labels

    def condition(self) -> sa.ColumnElement[bool]:
        """The condition on a row of `versions`, as SQL."""
        labels, versions = schema.labels.c, schema.versions.c
        of_version = (labels.name == versions.name, labels.version == versions.version)
        carried = sa.exists().where(*of_version, labels.key == self.key)
        match self.operator:
            case Operator.IN:
                return carried.where(labels.value.in_(self.values))
            case Operator.NOT_IN:
                return ~carried.where(labels.value.in_(self.values))
            case Operator.EXISTS:
                return carried
            case Operator.ABSENT:
                return ~carried


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """Terms that labels must all meet; without terms, every adapter is selected."""

    terms: Sequence[Term] = ()

    @classmethod
    def parse(cls, text: str) -> LabelSelector:
        """Reads `team=a, stage in (test, live), !retired`; "" selects every adapter.

        Raises Refusal(FIELD_INVALID).
        """
        if len(text) > MAX_SELECTOR:
            raise _invalid(f"a label selector has at most {MAX_SELECTOR} characters")
        terms: list[Term] = []
        at = 0
        while text[at:].strip():
            found = _TERM.match(text, at)
            rest = text[found.end() :] if found else ""
            if found is None or (rest and rest[0] != ","):
                raise _invalid(
                    f"cannot be read from {text[at:][:40]!r}; write key=value, key!=value, "
                    "key in (a, b), key notin (a, b), key or !key, joined by commas"
                )
            terms.append(_term(found))
            at = found.end() + 1
            if rest.strip() == ",":
                raise _invalid("ends with a comma")
        if len(terms) > MAX_LABELS:
            raise _invalid(f"a label selector has at most {MAX_LABELS} terms")
        check_keys({term.key for term in terms})
        return cls(tuple(terms))

    @property
    def keys(self) -> frozenset[str]:
        """The keys of all terms."""
        return frozenset(term.key for term in self.terms)

    @property
    def fixed(self) -> Mapping[str, str]:
        """The labels whose value the selector states: those of `key=value`."""
        return {
            term.key: term.values[0]
            for term in self.terms
            if term.operator is Operator.IN and len(term.values) == 1
        }

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet all terms."""
        return all(term.matches(labels) for term in self.terms)

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The terms as SQL conditions on a row of `versions`, all of which must hold."""
        return [term.condition() for term in self.terms]

    def __str__(self) -> str:
        return ",".join(map(_text, self.terms))


EVERYTHING: Final = LabelSelector()
"""Selects every adapter."""

NOTHING: Final = LabelSelector((Term("none", Operator.IN, ()),))
"""Selects no adapter: no value is among none. Its text is not one that `parse` reads."""


def _term(found: re.Match[str]) -> Term:
    if found["absent"]:
        return Term(found["absent_key"], Operator.ABSENT)
    key = found["key"]
    if found["set"]:
        values = tuple(value.strip() for value in found["values"].split(","))
        return Term(key, Operator.IN if found["set"] == "in" else Operator.NOT_IN, _checked(values))
    match found["equals"]:
        case None:
            return Term(key, Operator.EXISTS)
        case "!=":
            return Term(key, Operator.NOT_IN, _checked((found["value"],)))
        case _:
            return Term(key, Operator.IN, _checked((found["value"],)))


def _checked(values: tuple[str, ...]) -> tuple[str, ...]:
    if any(len(value) > MAX_VALUE or not value.isprintable() for value in values):
        raise _invalid(f"a label value has at most {MAX_VALUE} characters, all of them printable")
    return values


def _text(term: Term) -> str:
    match term.operator, term.values:
        case Operator.EXISTS, _:
            return term.key
        case Operator.ABSENT, _:
            return f"!{term.key}"
        case operator, (value,) if _PLAIN.fullmatch(value):
            return f"{term.key}{'=' if operator is Operator.IN else '!='}{value}"
        case operator, values:
            return f"{term.key} {operator.value} ({','.join(values)})"


def _invalid(message: str) -> Refusal:
    return Refusal(Reason.FIELD_INVALID, message, "selector")
