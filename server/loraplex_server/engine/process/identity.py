"""Whether an engine, restarted or one of several, serves what the first one serves.

That is the same base model with the same limits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from loraplex_model.base.durable import read_regular

from loraplex_server.engine.messages import Hello

TOKENIZER_FILES: Final = ("tokenizer.json", "model.json")
"""Files of the model's directory that the front has read at its start."""


_BY_MEMORY: Final = frozenset({"num_blocks", "model.max_context"})
"""Fields of `Hello` that depend on how much memory of a GPU is free when the engine starts."""


class BaseChanged(Exception):
    """A restarted engine reports another base model than the first one. The message says how."""


def tokenizer_digests(hello: Hello) -> Mapping[str, str]:
    """SHA-256 of the tokenizer's files, by name; files that cannot be read are left out. Blocks."""
    digests: dict[str, str] = {}
    for name in TOKENIZER_FILES:
        try:
            data = read_regular(Path(hello.model.tokenizer_path) / name)
        except OSError:
            continue
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def differences(first: Hello, now: Hello) -> list[str]:
    """What two engines report differently, as `field: old, now new`.

    Fields in which engines may differ are left out: on a GPU the size of the KV cache, and the
    context length that follows from it. Each engine refuses requests that do not fit into its own.
    """
    own = _BY_MEMORY if first.model.device.startswith("cuda") else frozenset()
    old, new = dict(_fields(msgspec.to_builtins(first))), dict(_fields(msgspec.to_builtins(now)))
    return [
        f"{name}: {old.get(name)}, now {new.get(name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name not in own
    ]


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, each with its dotted path."""
    if not isinstance(value, dict):
        yield path, value
        return
    for name, item in value.items():
        yield from _fields(item, f"{path}.{name}" if path else str(name))
