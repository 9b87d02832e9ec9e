"""How methods declare their options: common types and options, and the problems found in them.

Each method declares its options as a `MethodOptions` beside its code. Values may be typed, as in a
file, or text, as on a command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.refusal import Problem, Reason, Refusal
from pydantic import BaseModel, BeforeValidator, Field

from loraplex_training.spec.fields import STRICT, AboveZero, Positive, Whole, expected, split_pairs

_MOST_LAYERS = 1 << 16


class MethodOptions(BaseModel):
    """Base of the options of a method."""

    model_config = STRICT


def split_names(value: object) -> object:
    """Splits text at its commas; strips the names of a list and drops empty ones."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return parts
    stripped = (part.strip() if isinstance(part, str) else part for part in parts)
    return tuple(part for part in stripped if part != "")


def _layers(value: object) -> object:
    """Sorted numbers, each once, of a number, of a list, or of text with ranges."""
    parts = value.split(",") if isinstance(value, str) else value
    found: set[int] = set()
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        if isinstance(part, float) and part.is_integer():
            part = int(part)
        first, dash, last = str(part).partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:  # a bool, too: its text is no number
            low, high = 0, -1
        if not 0 <= low <= high <= _MOST_LAYERS:
            raise expected('whole numbers, as in "0,2,4-7"')
        found.update(range(low, high + 1))
    if not found:
        raise expected('whole numbers, as in "0,2,4-7"')
    return tuple(sorted(found))


Names = Annotated[tuple[str, ...], BeforeValidator(split_names), Field(min_length=1)]
"""A list of names, or text with commas between them."""

Layers = Annotated[tuple[int, ...], BeforeValidator(_layers)]
"""Layer indices as a list or as text with ranges, "0,2,4-7". Sorted, without repetition."""

Ranks = Annotated[Mapping[str, Positive], BeforeValidator(split_pairs)]
Alphas = Annotated[Mapping[str, AboveZero], BeforeValidator(split_pairs)]
"""Numbers above 0 by name, or text: "q_proj=4,k_proj=8"."""

Rank = Annotated[Whole, Field(ge=1, le=AdapterLimits().max_rank)]


class TargetOptions(MethodOptions):
    """Options of methods that change projections."""

    target_modules: Names = ("all-linear",)
    """Modules to adapt: names (q_proj), ends of paths (layers.1.self_attn.q_proj), all-linear,
    attention, mlp or qv."""
    layers: Layers | None = None
    """Layers to adapt, as in "0,2,4-7". Default: all."""


class OptionProblems:
    """Collects the problems of a method's options, so that all of them are reported at once."""

    def __init__(self, method: str, found: Iterable[Problem] = ()) -> None:
        self._method = method
        self._found = list(found)

    def add(self, option: str, message: str) -> None:
        """Adds a problem that only the method can see; `message` says what to do about it."""
        self._found.append(Problem(f"method.{option}", message))

    def at_most(self, option: str, value: int, largest: int) -> int:
        """Returns `value`, or `largest` after a problem if that is exceeded."""
        if value > largest:
            self.add(option, f"{option} is {value}; it should be at most {largest}")
        return min(value, largest)

    def check(self) -> None:
        """Raises Refusal METHOD_INVALID with every problem, if there is one."""
        if self._found:
            raise Refusal.listing(
                Reason.METHOD_INVALID,
                (Problem(p.field, f"{self._method}: {p.message}") for p in self._found),
            )
