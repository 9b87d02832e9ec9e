"""Long lists in replies: they are made in slices, between which other calls go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import Message

SLICE: Final = 32
"""Entries that are made without a pause: a millisecond or two."""

M = TypeVar("M", bound=Message)


async def extend_in_slices(
    field: RepeatedCompositeFieldContainer[M],
    entries: Sequence[Any],
    describe: Callable[[Any], M] | None = None,
    size: int = SLICE,
) -> None:
    """Appends the entries, or what `describe` makes of them, to a field of a reply."""
    for at in range(0, len(entries), size):
        if at:
            await asyncio.sleep(0)
        part = entries[at : at + size]
        field.extend(part if describe is None else map(describe, part))
