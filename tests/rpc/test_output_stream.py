"""The outputs of a request, gathered until it is time to look."""

from __future__ import annotations

import asyncio
import math
import time

from loraplex_model.base.refusal import Reason
from loraplex_server.engine.messages import Failure, Output
from loraplex_server.engine.process.stream import OutputStream


def output(token: int, finish: str | None = None) -> Output:
    return Output(id=1, token_ids=[token], finish=finish)


def tokens(taken: list[Output]) -> list[int]:
    return [token for entry in taken for token in entry.token_ids]


async def test_what_is_there_is_taken_together_and_the_end_is_empty() -> None:
    stream = OutputStream()
    stream.put(output(1))
    stream.put(output(2))
    assert tokens(await stream.take()) == [1, 2]
    taking = asyncio.ensure_future(stream.take())
    await asyncio.sleep(0)
    stream.put(output(3, "length"))
    assert tokens(await taking) == [3]
    assert await stream.take() == []
    assert await stream.take(math.inf) == []


async def test_an_end_is_seen_at_once_however_late_the_look() -> None:
    for end in (output(2, "stop"), Output(id=1, error=Failure(Reason.ENGINE_FAULT, ""))):
        stream = OutputStream()
        stream.put(output(1))
        taking = asyncio.ensure_future(stream.take(math.inf))
        await asyncio.sleep(0.01)
        assert not taking.done()
        stream.put(end)
        assert (await taking)[-1] is end


async def test_it_wakes_when_it_is_time_and_something_is_there() -> None:
    # An output before the time waits for it; one after the time does not.
    for early in (True, False):
        stream = OutputStream()
        due = time.monotonic() + 0.05
        taking = asyncio.ensure_future(stream.take(due))
        await asyncio.sleep(0.0 if early else 0.1)
        assert not taking.done()
        stream.put(output(1))
        assert tokens(await taking) == [1]
        assert time.monotonic() >= due


async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    stream = OutputStream()
    taking = asyncio.ensure_future(stream.take(math.inf))
    await asyncio.sleep(0)
    stream.put(output(1))
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    assert tokens(await stream.take()) == [1]
