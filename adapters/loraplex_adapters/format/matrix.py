"""The support matrix: every kind and every option, from the tables that the reader uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loraplex_adapters.format.kinds import KINDS
from loraplex_adapters.format.support import COMMON, OTHERS, UNSERVED, Option


def markdown() -> str:
    """Returns the matrix as in docs/adapters.md, without a trailing newline."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| `peft_type` | what it is | |"
    yield "|---|---|---|"
    for kind in KINDS.values():
        yield f"| `{kind.peft_type}` | {kind.summary} | served |"
    for name, what in sorted(UNSERVED.items()):
        yield f"| `{name}` | {what} | refused |"
    yield ""
    yield "| `peft_type` | option | | |"
    yield "|---|---|---|---|"
    yield from _options("all", COMMON)
    yield from _options("all", OTHERS)
    for kind in KINDS.values():
        yield from _options(f"`{kind.peft_type}`", kind.options)


def _options(kind: str, options: Mapping[str, Option]) -> Iterator[str]:
    for key, option in sorted(options.items()):
        yield f"| {kind} | `{key}` | {option.support.value} | {option.note} |"
