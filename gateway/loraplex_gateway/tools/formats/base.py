"""What all formats have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from loraplex_gateway.tools.functions import Function
from loraplex_gateway.tools.grammar import CallForm
from loraplex_gateway.tools.source import Malformed, Source, Steps


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call as the model wrote it; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallMarks:
    """The texts by which a format is told from an answer.

    Attributes:
        openers: what begins calls, anywhere in the answer.
        at_start: whether calls may stand at the beginning of the answer without an opener.
        hidden: further texts that are not shown.
        special: whether openers are special tokens of the models, which grammars of text do not
            describe.
    """

    openers: tuple[str, ...] = ()
    at_start: bool = False
    hidden: tuple[str, ...] = ()
    special: bool = False


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    @property
    def marks(self) -> CallMarks:
        """The texts that begin calls."""

    @property
    def new_id(self) -> Callable[[], str]:
        """Makes the ids of calls."""

    @property
    def form(self) -> CallForm:
        """The form of enforced calls: a Wire, if their arguments are written as JSON."""

    def read(
        self, source: Source, opener: str, functions: Mapping[str, Function]
    ) -> Steps[list[FunctionCall]]:
        """Reads the calls that follow `opener`, which is "" at the beginning of the answer.

        Raises Malformed.
        """


def written(name: str, arguments: Mapping[str, Any]) -> FunctionCall:
    """A call whose arguments were not written as JSON. Raises Malformed if they cannot be."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):
        raise Malformed from None
    return FunctionCall(name, text)


def json_calls(text: str, functions: Collection[str]) -> list[FunctionCall]:
    """The calls in a JSON object or in a list of them. Raises Malformed.

    The functions must be among `functions`. The keys of families differ: the name is under "name",
    "tool_name" or "function", the arguments are under "arguments" or "parameters".
    """
    try:
        if text.startswith("["):
            found = msgspec.json.decode(text, type=list[dict[str, msgspec.Raw]])
        else:
            found = [msgspec.json.decode(text, type=dict[str, msgspec.Raw])]
        calls = [_call(each) for each in found]
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise Malformed from None
    if not calls or any(call.name not in functions for call in calls):
        raise Malformed
    return calls


_NAMES: Final = ("name", "tool_name", "function")
_ARGUMENTS: Final = ("arguments", "parameters")


def _call(fields: Mapping[str, msgspec.Raw]) -> FunctionCall:
    name = next((fields[key] for key in _NAMES if key in fields), None)
    if name is None:
        raise Malformed
    given = next((bytes(fields[key]) for key in _ARGUMENTS if key in fields), b"{}")
    return FunctionCall(msgspec.json.decode(name, type=str), object_text(given))


def object_text(data: bytes) -> str:
    """The text of a JSON object, which may stand in a JSON string. Raises Malformed.

    Null becomes an object without members.
    """
    try:
        value: Any = msgspec.json.decode(data)
        if isinstance(value, str):
            data = value.strip().encode()
            value = msgspec.json.decode(data) if data else None
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise Malformed from None
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise Malformed
    return data.decode().strip()
