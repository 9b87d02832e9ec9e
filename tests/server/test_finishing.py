"""Work that outlives its caller: its result, its end, and its failure."""

from __future__ import annotations

import asyncio
import logging

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.runtime.finishing import to_the_end

REFUSAL = Refusal(Reason.FIELD_INVALID, "no")


async def outlived(error: Exception | None) -> bool:
    """Whether work goes on to its end, which is `error`, after its caller was cancelled."""
    go, ended = asyncio.Event(), asyncio.Event()

    async def work() -> int:
        await go.wait()
        ended.set()
        if error is not None:
            raise error
        return 5

    caller = asyncio.create_task(to_the_end(work()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go.set()
    await asyncio.wait_for(ended.wait(), 10)
    await asyncio.sleep(0.01)
    return ended.is_set()


async def test_the_caller_gets_the_result() -> None:
    async def work() -> int:
        return 5

    async def refused() -> int:
        raise REFUSAL

    assert await to_the_end(work()) == 5
    with pytest.raises(Refusal):
        await to_the_end(refused())


@pytest.mark.parametrize(
    ("error", "lines"), [(None, 0), (REFUSAL, 0), (RuntimeError("lost"), 1)], ids=str
)
async def test_work_ends_without_its_caller_and_only_faults_are_logged(
    error: Exception | None, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert await outlived(error)
    assert len(caplog.records) == lines
