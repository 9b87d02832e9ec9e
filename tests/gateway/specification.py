"""What gateway/openapi.yaml declares."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import httpx2 as httpx
import yaml

FILE = Path(__file__).resolve().parents[2] / "gateway" / "openapi.yaml"


@cache
def document() -> dict[str, Any]:
    """The specification."""
    return yaml.safe_load(FILE.read_text("utf-8"))


def operation(method: str, path: str) -> dict[str, Any] | None:
    """The operation for a path; None if there is none. Fixed paths come before patterns."""
    found = [
        ((pattern.count("{"), -pattern.count("/")), operations)
        for pattern, operations in document()["paths"].items()
        if re.fullmatch(re.sub(r"\{(\w+)\}", ".+", pattern), path)
    ]
    best = min(found, key=lambda each: each[0], default=((0, 0), {}))[1]
    return best.get(method.lower())


async def require_declared(answer: httpx.Response) -> None:
    """Raises AssertionError for an answer whose status the operation does not declare."""
    method, path = answer.request.method, answer.request.url.path
    declared = operation(method, path)
    if declared is None:
        assert answer.status_code in (404, 405), f"{method} {path} is not in {FILE.name}"
        return
    statuses = declared["responses"].keys()
    assert str(answer.status_code) in statuses, f"{method} {path}: {answer.status_code}"
