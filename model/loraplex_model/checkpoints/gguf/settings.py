"""The metadata below one architecture's prefix, read key by key.

A key that is neither read nor harmless makes the file another model, so `refuse_unread` names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported
from loraplex_model.checkpoints.gguf.header import shown

_MOST = 1 << 31


class GgufSettings:
    """Reads `ARCHITECTURE.KEY` entries; each accessor takes the key without its prefix.

    A list has one value for each layer; it is read as a single value if all are equal. Every
    accessor raises `Refusal`: MODEL_INVALID for a value of a wrong type or out of bounds,
    MODEL_UNSUPPORTED for layers that differ.
    """

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self._path, self._prefix = path, f"{architecture}."
        self._values = {
            key.removeprefix(self._prefix): value
            for key, value in metadata.items()
            if key.startswith(self._prefix)
        }
        self._unread = set(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` None for one that must exist."""
        value = self._value(key, default)
        if type(value) is not int or not 0 < value < _MOST:
            raise self.invalid(key, value, "a positive integer")
        return value

    def natural(self, key: str, default: int | None) -> int:
        """An integer from 0 on; `default` None for one that must exist."""
        value = self._value(key, default)
        if type(value) is not int or not 0 <= value < _MOST:
            raise self.invalid(key, value, "0 or a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; `default` None for one that must exist."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.invalid(key, value, "a finite number above 0")
        return float(value)

    def at_least_zero(self, key: str, default: float | None) -> float:
        """A finite number from 0 on; `default` None for one that must exist."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.invalid(key, value, "a finite number from 0 on")
        return float(value)

    def list(self, key: str) -> list[Any] | None:
        """A list with a value for each layer; None if the key has none or one value for all."""
        value = self._values.get(key)
        if not isinstance(value, list):
            return None
        self._unread.discard(key)
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.invalid(key, value, "a string")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses a value that is none of `allowed`; numbers may differ by float32's rounding.

        A key that does not exist is taken.
        """
        if key not in self._values:
            return
        value = self._value(key, None)
        for other in allowed:
            if _is_number(value, other):
                if math.isclose(value, other, rel_tol=1e-6):
                    return
            elif value == other and type(value) is type(other):
                return
        raise self.unsupported(key, f"supported: {', '.join(map(repr, allowed))}")

    def is_unread(self, key: str) -> bool:
        """Whether the key exists and was neither read nor ignored."""
        return key in self._unread

    def ignore(self, key: str) -> None:
        """Marks a key as one that changes no computation."""
        self._unread.discard(key)

    def refuse_unread(self) -> None:
        """Raises `Refusal` (MODEL_UNSUPPORTED) for the first key that was not read."""
        for key in sorted(self._unread):
            raise self.unsupported(key, "this setting is not read from GGUF files")

    def unsupported(self, key: str, why: str) -> Refusal:
        """The refusal of a key that exists, with its value."""
        value = shown(self._values[key])
        return model_unsupported(
            f"{self._path} has {self._prefix}{key} = {value}, which would not be computed; {why}"
        )

    def invalid(self, key: str, value: Any, wanted: str) -> Refusal:
        """The refusal of a key with a value that makes no sense."""
        at = f"{self._path} has {self._prefix}{key}"
        return model_invalid(f"{at} = {shown(value)}; it must be {wanted}")

    def _value(self, key: str, default: Any) -> Any:
        self._unread.discard(key)
        value = self._values.get(key, default)
        if value is None:
            raise model_invalid(f"{self._path} has no {self._prefix}{key}")
        if isinstance(value, list):
            if any(item != value[0] for item in value):
                raise self.unsupported(key, "layers that differ in it are not supported")
            value = value[0] if value else None
        return value


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
