"""A corpus of JSON schemas: schemas/corpus.jsonl, one object in each line.

`valid` and `invalid` are instances; `refused` schemas are those that the server does not accept.
Properties are in the order of their schemas, as the server writes them.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

CORPUS = Path(__file__).parent / "schemas" / "corpus.jsonl"


@cache
def entries() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CORPUS.read_text("utf-8").splitlines()]


def accepted() -> list[dict[str, Any]]:
    return [entry for entry in entries() if not entry.get("refused")]


def validator(schema: Any) -> Any:
    """jsonschema's validator, with those formats that it checks as the standard does."""
    formats = jsonschema.FormatChecker(formats=["date", "ipv4", "uuid", "email"])

    @formats.checks("date-time", raises=ValueError)
    def _is_date_time(value: object) -> bool:
        return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None

    return jsonschema.Draft202012Validator(schema, format_checker=formats)
