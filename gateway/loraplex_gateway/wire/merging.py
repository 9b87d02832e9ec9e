"""Several sources of events as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")

_WAITING: Final = 64
"""Most events that wait for their reader; sources pause above it."""


@dataclass(frozen=True, slots=True)
class _End:
    """A source has ended, well or with an error."""

    error: Exception | None = None


async def merged(
    sources: Sequence[AsyncGenerator[T, None]], at_once: int = 64
) -> AsyncGenerator[T, None]:
    """Yields what the sources yield, in the order in which it comes.

    At most `at_once` of them run at a time. All end with this iterator, and with the first error,
    which is raised.
    """
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[T | _End] = asyncio.Queue(_WAITING)
    places = asyncio.Semaphore(at_once)

    async def follow(source: AsyncGenerator[T, None]) -> None:
        end = _End()
        async with places, contextlib.aclosing(source):
            try:
                async for item in source:
                    await queue.put(item)
            except Exception as error:
                end = _End(error)
        await queue.put(end)

    tasks = [asyncio.create_task(follow(source)) for source in sources]
    running = len(tasks)
    try:
        while running:
            found = await queue.get()
            if not isinstance(found, _End):
                yield found
                continue
            if found.error is not None:
                raise found.error
            running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for source in sources:  # those that never ran
            await source.aclose()


async def all_of(work: Sequence[asyncio.Future[T]]) -> list[T]:
    """The results in their order. Raises the first error, and cancels the others then."""
    try:
        return list(await asyncio.gather(*work))
    finally:
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)
