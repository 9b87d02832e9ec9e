"""Several sources of events as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

_WAITING: Final = 64
"""Most events that wait for their reader; sources pause above it."""


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
    queue: asyncio.Queue[T] = asyncio.Queue(_WAITING)
    places = asyncio.Semaphore(at_once)

    async def follow(source: AsyncGenerator[T, None]) -> None:
        async with places, contextlib.aclosing(source):
            async for item in source:
                await queue.put(item)

    tasks = [asyncio.create_task(follow(source)) for source in sources]
    ended = asyncio.gather(*tasks)
    try:
        while True:
            coming = asyncio.create_task(queue.get())
            await asyncio.wait({coming, ended}, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                yield coming.result()
                continue
            coming.cancel()
            ended.result()
            while not queue.empty():
                yield queue.get_nowait()
            return
    finally:
        ended.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(ended, *tasks, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def all_of(work: Sequence[asyncio.Future[T]]) -> list[T]:
    """The results in their order. Raises the first error, and cancels the others then."""
    try:
        return list(await asyncio.gather(*work))
    finally:
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)
