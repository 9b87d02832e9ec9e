"""`oneOf` whose branches exclude each other by a tag, as programs write unions of objects.

The library turns `oneOf` into `anyOf` only where types or constants show that no value fits two
branches. It does not look into objects. Here a property shows it that every branch demands, with
values that no other branch has.
"""

from __future__ import annotations

import json
from typing import Any, Final

_MOST_REFERENCES: Final = 8
"""References that lead to one schema."""


def with_tagged_unions(schema: Any) -> tuple[Any, bool]:
    """The schema with `anyOf` in place of such `oneOf`, and whether there were any."""
    found = _Unions(schema)
    made = found.rewritten(schema)
    return made, found.changed


class _Unions:
    def __init__(self, root: Any) -> None:
        self._root = root
        self.changed = False

    def rewritten(self, schema: Any) -> Any:
        """A copy of a part of the schema."""
        if isinstance(schema, list):
            return [self.rewritten(each) for each in schema]
        if not isinstance(schema, dict):
            return schema
        union = schema.get("oneOf")
        is_tagged = isinstance(union, list) and "anyOf" not in schema and self._is_tagged(union)
        self.changed |= is_tagged
        return {
            "anyOf" if is_tagged and name == "oneOf" else name: (
                value if name in ("enum", "const", "default", "examples") else self.rewritten(value)
            )
            for name, value in schema.items()
        }

    def _is_tagged(self, union: list[Any]) -> bool:
        tags = [self._tags(branch) for branch in union]
        return any(
            all(name in each for each in tags) and _are_disjoint([each[name] for each in tags])
            for name in (tags[0] if tags else ())
        )

    def _tags(self, branch: Any) -> dict[str, set[str]]:
        """The properties that a branch demands and whose values are listed, with the values."""
        branch = self._resolved(branch)
        properties, required = branch.get("properties"), branch.get("required")
        if branch.get("type") != "object" or not isinstance(properties, dict):
            return {}
        tags = {}
        for name, value in properties.items():
            listed = self._values(self._resolved(value))
            if isinstance(required, list) and name in required and listed:
                tags[name] = listed
        return tags

    @staticmethod
    def _values(schema: dict[str, Any]) -> set[str]:
        """The texts that a schema allows, if it lists them; numbers are equal in several forms."""
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            return set()
        return {json.dumps(each) for each in values}

    def _resolved(self, schema: Any) -> dict[str, Any]:
        for _ in range(_MOST_REFERENCES):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(reference, str) or not reference.startswith("#/"):
                break
            schema = self._root
            for step in reference[2:].split("/"):
                key = step.replace("~1", "/").replace("~0", "~")
                schema = schema.get(key) if isinstance(schema, dict) else None
        return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def _are_disjoint(sets: list[set[str]]) -> bool:
    return len(set().union(*sets)) == sum(map(len, sets))
