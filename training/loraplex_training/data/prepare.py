"""Prepares a row before its shape is determined: nulls, names of columns, names of roles."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex_adapters.format.strict_json import loads, shown

FREE: Final = frozenset({"arguments", "parameters"})
"""Keys of tools and of their calls whose content is free, so that null is a value there."""

NESTED: Final = frozenset({"messages", "conversations", "conversation", "tools"})
"""Columns of tables whose cells may hold JSON as text."""


@dataclass(frozen=True, slots=True)
class RowNames:
    """Names that differ from those of the shapes.

    Attributes:
        columns: names of keys in the file, by the names that the shapes use.
        roles: the roles of the shapes, by the roles in the file.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row whose keys have the names of the shapes.

        Raises ValueError if a key would be there twice; the message completes "this line …".
        """
        if not self.columns:
            return dict(row)
        old = {name: new for new, name in self.columns.items()}
        if taken := [new for new in self.columns if new in row and new not in old]:
            new = shown(taken[0])
            given = self.columns[taken[0]]
            if given in row:
                raise ValueError(
                    f'has "{new}" and "{shown(given)}", which --columns makes "{new}" too; name '
                    "only one"
                )
        return {old.get(key, key): value for key, value in row.items()}

    def with_roles(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns a row in whose lists of messages the roles have the names of the shapes."""
        if not self.roles:
            return row
        return {
            key: [self._message(one) if isinstance(one, dict) else one for one in value]
            if isinstance(value, list)
            else value
            for key, value in row.items()
        }

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        return {
            key: self.roles.get(value, value)
            if key in ("role", "from") and isinstance(value, str)
            else value
            for key, value in message.items()
        }


def with_nested(row: dict[str, Any], removed: list[str]) -> dict[str, Any]:
    """Returns the row of a table with the JSON in its cells parsed, and without nulls.

    Raises ValueError if a cell that should hold JSON does not.
    """
    made = dict(row)
    for key in NESTED & row.keys():
        if isinstance(text := row[key], str):
            try:
                made[key] = without_nulls(loads(text.encode()), FREE, removed, key)
            except ValueError as error:
                raise ValueError(f'has a cell of the column "{key}" that {error}') from None
    return made


def without_nulls(
    value: Any, free: Collection[str] = FREE, removed: list[str] | None = None, path: str = ""
) -> Any:
    """Returns a JSON value without the keys whose value is null, at any depth.

    Elements of lists are kept, and so is everything below the keys in `free`. The paths of what was
    removed are added to `removed`. Raises ValueError if the value is nested too deeply.
    """
    try:
        return _without(value, free, [] if removed is None else removed, path)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _without(value: Any, free: Collection[str], removed: list[str], path: str) -> Any:
    if isinstance(value, list):
        return [
            _without(one, free, removed, f"{path}[{i}]") if isinstance(one, dict | list) else one
            for i, one in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, inner in value.items():
        if inner is None:
            removed.append(f"{path}.{key}" if path else key)
        elif key in free or not isinstance(inner, dict | list):
            kept[key] = inner
        else:
            kept[key] = _without(inner, free, removed, f"{path}.{key}" if path else key)
    return kept
