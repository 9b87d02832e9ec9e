"""Settings of earlier versions. They are refused, with the name that took their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

FORMER: Final = {"share_base_prefixes": "prefix_cache"}
"""Names of earlier versions, and those that took their place."""


def in_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The former settings that environment variables set, with their values."""
    names = {name: f"LORAPLEX_{name.upper()}" for name in FORMER}
    return {name: variables[key] for name, key in names.items() if key in variables}


def objection(name: str) -> str:
    """What is said of a setting that does not exist."""
    if name not in FORMER:
        return "there is no such setting"
    return f"this setting is now called {FORMER[name]}; see docs/operations.md"
