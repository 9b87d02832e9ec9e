"""Several streams of events as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class _Mark(Enum):
    """What stands in the queue beside items."""

    END = "end of a stream"


async def interleaved(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields what several streams yield, as it comes; nothing before the first stream's first item.

    Raises the first error of any of them. Then, or if this generator is closed, all are closed. At
    most one item that nobody has asked for is taken from each.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for each in only:
                yield each
        return
    items: asyncio.Queue[T | _Mark] = asyncio.Queue(1)
    begun = asyncio.Event()
    failures: list[Exception] = []

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    if stream is not streams[0]:
                        await begun.wait()
                    await items.put(item)
        except Exception as error:
            failures.append(error)
        await items.put(_Mark.END)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    left = len(pumps)
    try:
        while left:
            item = await items.get()
            begun.set()
            if failures:
                raise failures.pop(0)
            if item is _Mark.END:
                left -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
