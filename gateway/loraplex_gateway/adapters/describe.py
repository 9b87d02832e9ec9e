"""Adapters, registrations and reports as JSON."""

from __future__ import annotations

from typing import Any

import msgspec
from loraplex import AdapterInfo, Registration, Validation
from loraplex.sources.foreign_ids import MODEL_ID_LABEL


def adapter(info: AdapterInfo) -> dict[str, Any]:
    """An adapter: all fields of the client's `AdapterInfo`, and its ids."""
    return {
        "object": "adapter",
        "id": f"{info.name}@{info.version}",
        "model": info.labels.get(MODEL_ID_LABEL) or info.name,
        **msgspec.to_builtins(info),
    }


def registration(done: Registration) -> dict[str, Any]:
    """The result of a registration."""
    return {
        "object": "adapter.registration",
        "adapter": adapter(done.adapter),
        "created": done.created,
        "notes": list(done.notes),
    }


def validation(report: Validation) -> dict[str, Any]:
    """The result of a check."""
    return {
        "object": "adapter.validation",
        "valid": report.valid,
        **msgspec.to_builtins(report),
    }


def many(found: list[AdapterInfo]) -> dict[str, Any]:
    """A list of adapters."""
    return {"object": "list", "data": [adapter(info) for info in found]}


def deleted(name: str, kind: str) -> dict[str, Any]:
    """The answer for something that does not exist any more."""
    return {"id": name, "object": kind, "deleted": True}
