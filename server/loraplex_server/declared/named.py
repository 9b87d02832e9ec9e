"""Adapters that are named in the settings, and how other servers' command lines name them.

[[adapters]]                              in the TOML file
name = "pirate"
path = "/adapters/pirate"

--lora-modules pirate=/adapters/pirate '{"name": "pirate", "path": "/adapters/pirate"}'
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FLAG: Final = "--lora-modules"

_IGNORED: Final = frozenset({"base_model_name", "is_3d_lora_weight"})
"""Keys of vLLM's modules that change nothing here: a server has one base model."""


class NamedAdapter(BaseModel):
    """An adapter that is registered when the server starts.

    Attributes:
        name: the name; any other text becomes the id that clients of the gateway use.
        path: folder of the adapter on this machine, anywhere.
        labels: labels of the version.
        load: whether it is loaded onto the device before the server takes calls.
        pin: whether it is loaded and stays on the device.
        alias: an alias that points to it; "" for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=256)
    path: Path
    labels: dict[str, str] = {}
    load: bool = False
    pin: bool = False
    alias: str = ""


def require_different(adapters: Iterable[NamedAdapter]) -> None:
    """Raises ValueError if two adapters have the same name, or the same alias."""
    for what, texts in (
        ("name", [each.name for each in adapters]),
        ("alias", [each.alias for each in adapters if each.alias]),
    ):
        twice = [text for text, count in Counter(texts).items() if count > 1]
        if twice:
            raise ValueError(f"two adapters have the {what} {twice[0]!r}")


def parse_modules(texts: Iterable[str]) -> list[NamedAdapter]:
    """Reads the values of `--lora-modules`. Raises ValueError."""
    return [_parse(text) for text in texts]


def spread(arguments: Sequence[str]) -> list[str]:
    """A command line on which each value of `--lora-modules` has a flag of its own.

    Other servers take all values that follow the flag, up to the next one.
    """
    found: list[str] = []
    follows = False
    for argument in arguments:
        if argument == FLAG:
            follows = True
        elif follows and not argument.startswith("-"):
            found += [FLAG, argument]
        else:
            follows = argument.startswith(f"{FLAG}=")
            found.append(argument)
    return found


def _parse(text: str) -> NamedAdapter:
    given = text.strip()
    if len(given) >= 2 and given[0] == given[-1] == "'":
        given = given[1:-1]  # of a command line that no shell has read
    values: Any
    if given.startswith("{"):
        try:
            values = json.loads(given)
        except (ValueError, RecursionError):
            raise ValueError(f"{text!r} is not JSON") from None
        values = {key: value for key, value in values.items() if key not in _IGNORED}
    else:
        name, separator, path = given.partition("=")
        if not separator or not name or not path:
            raise ValueError(f"{text!r} is neither NAME=PATH nor JSON with name and path")
        values = {"name": name, "path": path}
    try:
        return NamedAdapter.model_validate(values)
    except ValidationError as error:
        (first, *_) = error.errors()
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{text!r}: {where}: {first['msg']}") from None
