"""A method's options, read strictly: typed values from a file, or text from a command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

from loraplex_model.base.refusal import Reason, Refusal

Value = TypeVar("Value")

_FLAGS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


class Options:
    """Takes options out one by one and collects what is wrong with them; `done` raises it all.

    Reading never raises: where a value is wrong the default comes back and the problem is noted.
    Lists and mappings may be written as text: "q_proj,v_proj", "0,2,4-7", "q_proj=4,k_proj=8".
    """

    def __init__(self, method: str, values: Mapping[str, object]) -> None:
        self._method = method
        self._values = values
        self._known: list[str] = []
        self._problems: list[str] = []

    def given(self, name: str) -> bool:
        """Whether it was set at all; makes the name known."""
        return self._raw(name) is not None

    def integer(
        self, name: str, default: int, minimum: int | None = None, maximum: int | None = None
    ) -> int:
        """A whole number, within bounds that are included."""
        value = self._raw(name)
        if value is None:
            return default
        found = _integer(value)
        if found is None:
            return self._wrong(name, value, "a whole number", default)
        return self._bounded(name, found, minimum, maximum, default)

    def number(
        self,
        name: str,
        default: float,
        minimum: float | None = None,
        maximum: float | None = None,
        above: float | None = None,
        below: float | None = None,
    ) -> float:
        """A finite number; `minimum` and `maximum` are included, `above` and `below` are not."""
        value = self._raw(name)
        if value is None:
            return default
        found = _number(value)
        if found is None:
            return self._wrong(name, value, "a number", default)
        if above is not None and found <= above:
            return self._wrong(name, value, f"above {above:g}", default)
        if below is not None and found >= below:
            return self._wrong(name, value, f"below {below:g}", default)
        return self._bounded(name, found, minimum, maximum, default)

    def flag(self, name: str, default: bool) -> bool:
        """true or false (as text also yes, no, on, off, 1, 0)."""
        value = self._raw(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        found = _FLAGS.get(str(value).strip().lower()) if isinstance(value, str | int) else None
        return self._wrong(name, value, "true or false", default) if found is None else found

    def text(self, name: str, default: str) -> str:
        """Any text."""
        value = self._raw(name)
        if value is None or isinstance(value, str):
            return default if value is None else value
        return self._wrong(name, value, "text", default)

    def choice(self, name: str, default: str, choices: Iterable[str]) -> str:
        """One of `choices`."""
        allowed = tuple(choices)
        value = self._raw(name)
        if value is None or value in allowed:
            return default if value is None else value
        return self._wrong(
            name, value, f"one of {', '.join(allowed)}{_near(value, allowed)}", default
        )

    def names(self, name: str, default: Sequence[str]) -> tuple[str, ...]:
        """A list of names, or text with commas between them; not empty where it is given."""
        value = self._raw(name)
        if value is None:
            return tuple(default)
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts):
            return self._wrong(name, value, "a list of names", tuple(default))
        found = tuple(part.strip() for part in parts if part.strip())
        return found or self._wrong(name, value, "at least one name", tuple(default))

    def integers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of whole numbers of at least 0, or text: "0,2,4-7". Sorted, each once."""
        value = self._raw(name)
        if value is None:
            return tuple(default)
        parts = value.split(",") if isinstance(value, str) else value
        found: set[int] = set()
        for part in parts if isinstance(parts, list | tuple) else [parts]:
            first, dash, last = part.partition("-") if isinstance(part, str) else (part, "", part)
            low, high = _integer(first), _integer(last if dash else first)
            if low is None or high is None or not 0 <= low <= high <= 1 << 16:
                return self._wrong(name, value, 'whole numbers, as in "0,2,4-7"', tuple(default))
            found.update(range(low, high + 1))
        return tuple(sorted(found)) or self._wrong(
            name, value, "at least one number", tuple(default)
        )

    def mapping(self, name: str, whole: bool = False, above: float = 0.0) -> dict[str, float]:
        """Numbers above `above` by name, or text: "q_proj=4,k_proj=8"; `whole`: whole ones."""
        value = self._raw(name)
        if value is None:
            return {}
        pairs: list[tuple[object, object]]
        if isinstance(value, str):
            parts = [part.partition("=") for part in value.split(",") if part.strip()]
            pairs = [(key.strip(), number.strip()) for key, _, number in parts]
        elif isinstance(value, Mapping):
            pairs = list(value.items())
        else:
            return self._wrong(name, value, 'numbers by name, as in "q_proj=4,k_proj=8"', {})
        found: dict[str, float] = {}
        kind = "whole number" if whole else "number"
        for key, given in pairs:
            number = _integer(given) if whole else _number(given)
            if not isinstance(key, str) or not key or number is None or number <= above:
                self.refuse(f"{name}: {key!s} is {given!r}, not a {kind} above {above:g}")
            elif key in found:
                self.refuse(f"{name}: {key} is there twice")
            else:
                found[key] = number
        return found

    def refuse(self, problem: str) -> None:
        """Notes a problem that only the method can see, as "option: what, and what to do"."""
        self._problems.append(f"{self._method}: {problem}")

    def done(self) -> None:
        """Raises Refusal METHOD_INVALID with every problem, unknown names among them."""
        unknown = [name for name in self._values if name not in self._known]
        for name in unknown:
            near = _near(name, self._known)
            self.refuse(f"there is no option {name!r}{near}; there are {', '.join(self._known)}")
        if self._problems:
            raise Refusal.listing(Reason.METHOD_INVALID, self._problems)

    def _raw(self, name: str) -> object:
        if name not in self._known:
            self._known.append(name)
        return self._values.get(name)

    def _wrong(self, name: str, value: object, wanted: str, default: Value) -> Value:
        self.refuse(f"{name} is {value!r}, which should be {wanted}")
        return default

    def _bounded(
        self, name: str, value: Value, minimum: float | None, maximum: float | None, default: Value
    ) -> Value:
        number = cast(float, value)
        if minimum is not None and number < minimum:
            return self._wrong(name, value, f"at least {minimum:g}", default)
        if maximum is not None and number > maximum:
            return self._wrong(name, value, f"at most {maximum:g}", default)
        return value


def _near(value: object, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(str(value), names, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _integer(value: object) -> int | None:
    """Also of 16.0, which is what JSON makes of 16 in some hands."""
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
