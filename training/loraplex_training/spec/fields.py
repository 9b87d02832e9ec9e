"""Types of option values, and reading them with pydantic.

Values may be typed, as in a TOML file, or text, as on a command line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Final, TypeVar

from loraplex_model.base.names import suggest
from loraplex_model.base.refusal import SHOWN_PROBLEMS, Problem, Reason, Refusal
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

STRICT: Final = ConfigDict(
    extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
)

Options = TypeVar("Options", bound=BaseModel)

_BOUNDS: Final = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_EXPECTED: Final = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "text",
    "dict": "a table of keys and values",
    "mapping": "a table of keys and values",
    "list": "a list of tables, written [[job]]",
    "tuple": "a list",
    "too": "at least one value",
}
"""Expected values by the first word of pydantic's error type."""


def expected(text: str) -> PydanticCustomError:
    """The error of a validator whose value "should be `text`"."""
    return PydanticCustomError("expected", "{text}", {"text": text})


def one_of(choices: Collection[str]) -> AfterValidator:
    """A validator of text that should be one of `choices`."""

    def check(value: str) -> str:
        if value not in choices:
            *others, last = choices
            raise expected(f"{', '.join(others)} or {last}{suggest(value, choices)}")
        return value

    return AfterValidator(check)


def _no_bool(value: object) -> object:
    """Refuses true and false, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise expected("a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(ge=1)]
AboveZero = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]


def split_pairs(value: object) -> object:
    """Splits text like "q_proj=4,k_proj=8" into a mapping; returns other values as they are."""
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for part in filter(str.strip, value.split(",")):
        key, _, number = (word.strip() for word in part.partition("="))
        if not key:
            raise expected('numbers by name, as in "q_proj=4,k_proj=8"')
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = number
    return found


def split_names(value: object) -> object:
    """Splits text like "prompt=question,completion=answer"; checks that every name has a value."""
    pairs = split_pairs(value)
    if isinstance(pairs, Mapping) and not all(isinstance(n, str) and n for n in pairs.values()):
        raise expected('names, as in "prompt=question,completion=answer"')
    return pairs


def read(
    kind: type[Options], values: Mapping[str, object], field: str = ""
) -> tuple[Options | None, list[Problem]]:
    """The values as a `kind`, and everything that is wrong with them.

    `field` is the path of the values, as in "jobs.tickets". Values that are wrong or unknown are
    left out of the result, which is None if one of them is required.
    """
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    known = [info.alias or name for name, info in kind.model_fields.items()]
    problems = list(_problems(found, field, known))
    rest = dict(values)
    for one in found:
        key, *inner = one["loc"]
        value = rest.pop(str(key), None)
        if inner and isinstance(inner[0], str) and isinstance(table := split_pairs(value), Mapping):
            # The table's other entries may be right.
            rest[str(key)] = {name: own for name, own in table.items() if name != inner[0]}
    try:
        return kind.model_validate(rest), problems
    except ValidationError:
        return None, problems


def unknown(name: str, known: Collection[str]) -> str:
    """The sentence about a name that does not exist, with the nearest that does."""
    near = suggest(name, known)
    return f"there is no {name!r}{near or '; there are ' + ', '.join(known)}"


def located(problem: Problem) -> str:
    """Returns a problem's message with the job or the table that its field path names."""
    table, _, rest = problem.field.partition(".")
    if table == "jobs" and rest:
        return f"job {rest.partition('.')[0]!r}: {problem.message}"
    return f"[{table}]: {problem.message}" if rest else problem.message


def refusal(reason: Reason, problems: Sequence[Problem]) -> Refusal:
    """Returns the refusal for a non-empty list of problems; its message locates the first ones."""
    return Refusal(reason, "; ".join(map(located, problems[:SHOWN_PROBLEMS])), problems=problems)


def _problems(found: list[ErrorDetails], field: str, known: Collection[str]) -> Iterator[Problem]:
    for one in found:
        key = str(one["loc"][0])
        path = f"{field}.{key}" if field else key
        yield Problem(path, _sentence(key, one, known))


def _sentence(key: str, error: ErrorDetails, known: Collection[str]) -> str:
    """One of pydantic's errors in the words of this project."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown(key, known)
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        return str(context["error"])
    inner = error["loc"][1:]
    if inner and isinstance(inner[0], str):  # a key of a table
        key = f"{key}.{inner[0]}"
    if kind in _BOUNDS:
        bound, word = _BOUNDS[kind]
        return f"{key} is {value}; it should be {word} {context[bound]}"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "")
        near = suggest(value, choices.replace(" or ", ", ").split(", "))
        return f"{key} is {value!r:.80}; it should be {choices}{near}"
    wanted = context["text"] if kind == "expected" else _EXPECTED[kind.partition("_")[0]]
    return f"{key} is {value!r:.80}; it should be {wanted}"
