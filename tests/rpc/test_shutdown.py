"""Time limits of the shutdown: a step that hangs is passed over, a process that hangs ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex_server.app import Server
from loraplex_server.runtime.shutdown import within
from rpc.harness import running
from rpc.training_jobs import settings

HANGS = """
import asyncio, sys, threading, time
from pathlib import Path
from loraplex_server.runtime.shutdown import exit_within
exit_within(0.2, 7, lambda: Path(sys.argv[1]).touch())
threading.Thread(target=time.sleep, args=(600,)).start()  # not joined in time at the exit
async def hang():
    time.sleep(600)
asyncio.run(hang())
"""


async def test_a_step_that_hangs_or_fails_is_logged_and_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done = []

    async def good() -> None:
        done.append(True)

    async def fail() -> None:
        raise RuntimeError("broken")

    async def deaf() -> None:
        while not done:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                continue

    await asyncio.wait_for(within(0.05, "the deaf one does not stop", deaf()), 20)
    assert "the deaf one does not stop" in caplog.text
    await within(20, "the broken one does not stop", fail())
    assert "broken" in caplog.text
    await within(20, "the good one does not stop", good())
    assert done
    assert "the good one" not in caplog.text


@pytest.mark.fault("drain-unbounded")
def test_a_process_that_hangs_ends_in_time(tmp_path: Path) -> None:
    last = tmp_path / "last"
    ended = subprocess.run([sys.executable, "-c", HANGS, str(last)], timeout=60, check=False)
    assert ended.returncode == 7
    assert last.exists()


@pytest.mark.fault("drain-unbounded")
async def test_no_part_that_hangs_holds_the_end_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PART_SECONDS", "ENGINE_SECONDS", "TRAINING_SECONDS"):
        monkeypatch.setattr(f"loraplex_server.app.{name}", 0.2)

    async def hang(*_: object) -> None:
        await asyncio.sleep(600)

    async with running(tmp_path, drain_timeout=0.1, **settings(tmp_path)) as up:
        server: Server = up.server
        queue = server._training
        assert queue is not None
        stops = [(server.engine, server.engine.stop), (queue, queue.stop), (server._rpc, None)]
        for owner, _ in stops:
            monkeypatch.setattr(owner, "stop", hang)
        server._gate.enter()  # a call that never ends
        await asyncio.wait_for(server.drain(), 20)
        await asyncio.wait_for(server.close(), 20)
        monkeypatch.undo()
        server._gate.leave()
        await queue.stop(0.0)
        await server.engine.stop()
        await server._rpc.stop(0.0)
