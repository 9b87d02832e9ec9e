"""The engine as a process of its own: what survives its death, and when it must not live on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine.oracle import command, continuation
from loraplex_model.base.refusal import Refusal
from loraplex_server.engine.messages import (
    AdapterRef,
    Fatal,
    Hello,
    LoadDone,
    MergeDone,
    SamplingParams,
    Shutdown,
    StepReport,
    Submit,
)
from loraplex_server.engine.process import wire
from loraplex_server.engine.process.child import spawn
from loraplex_server.engine.process.client import EngineClient
from loraplex_server.engine.process.stream import OutputStream
from loraplex_server.engine.process.supervisor import Cause
from loraplex_server.engine.process.suspects import LossReport

GREEDY = SamplingParams(temperature=0.0)
BACKOFF = (0.01, 0.1)


class Observer:
    """Writes down what it is told; `until` waits for a fact."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.loads: list[LoadDone] = []
        self.merges: list[MergeDone] = []
        self.fatals: list[Fatal] = []
        self.deaths: list[tuple[Cause, LossReport]] = []
        self.restarts = 0
        self.readies = 0
        self._changed = asyncio.Event()

    def on_step(self, done: StepReport) -> None:
        self.steps.append(done)
        self._changed.set()

    def on_load(self, done: LoadDone) -> None:
        self.loads.append(done)
        self._changed.set()

    def on_merge(self, done: MergeDone) -> None:
        self.merges.append(done)
        self._changed.set()

    def on_restart(self) -> None:
        self.restarts += 1
        self._changed.set()

    def on_death(self, cause: Cause, report: LossReport) -> None:
        self.deaths.append((cause, report))
        self._changed.set()

    def on_ready(self, hello: Hello) -> None:
        self.readies += 1
        self._changed.set()

    def on_fatal(self, fatal: Fatal) -> None:
        self.fatals.append(fatal)
        self._changed.set()

    async def until(self, fact: Callable[[], bool]) -> None:
        while not fact():
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 60)


@asynccontextmanager
async def engine(arguments: list[str]) -> AsyncIterator[tuple[EngineClient, Observer]]:
    observer = Observer()
    client = EngineClient(arguments, observer, BACKOFF)
    await client.start()
    try:
        yield client, observer
    finally:
        await client.stop()


def ask(id: int, prompt: list[int], count: int = 5, **fields: object) -> Submit:
    return Submit(
        **{"id": id, "token_ids": prompt, "max_new_tokens": count, "sampling": GREEDY, **fields}
    )


async def drain(stream: OutputStream) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    outcome = None
    while outputs := await stream.take():
        for output in outputs:
            tokens += output.token_ids
            outcome = output.finish or (output.error.reason if output.error else None)
    return tokens, outcome


async def test_streams_of_different_adapters_run_together_and_get_their_own_tokens() -> None:
    async with engine(command(num_blocks=200)) as (client, _):
        refs = [[], [AdapterRef("sha256:a", "{}")], [AdapterRef("sha256:b", "{}", 0.5)]]
        streams = [client.submit(ask(i, [i, 7], adapters=refs[i % 3])) for i in range(30)]
        results = await asyncio.gather(*map(drain, streams))
        for i, result in enumerate(results):
            mix = [(ref.digest, ref.weight) for ref in refs[i % 3]]
            assert result == (continuation([i, 7], mix, 5), "length")
        assert client.stats is not None
        assert client.stats.used_blocks == 0
        assert {s.state for s in client.adapters.values()} == {"resident"}


async def test_an_abort_frees_everything_and_says_nothing_more() -> None:
    async with engine(command(step_seconds=0.002)) as (client, observer):
        stream = client.submit(ask(1, [1], 200))
        await stream.take()
        client.abort(1)
        client.abort(1)
        await observer.until(lambda: client.stats is not None and client.stats.used_blocks == 0)
        assert await drain(client.submit(ask(2, [2], 3))) == (continuation([2], [], 3), "length")


async def test_loads_and_unloads_are_answered_with_their_reasons() -> None:
    async with engine(command()) as (client, observer):
        ref = AdapterRef("sha256:a", json.dumps({"nbytes": 5}))
        await client.load(ref)
        await client.load(ref)
        assert client.adapters["sha256:a"].state == "resident"
        assert client.adapters["sha256:a"].bytes == 5
        with pytest.raises(Refusal) as failed:
            await client.load(AdapterRef("sha256:bad", json.dumps({"fail": "ADAPTER_INVALID"})))
        assert failed.value.reason == "ADAPTER_INVALID"
        await client.unload("sha256:a")
        assert client.adapters == {}
        assert [(load.digest, load.error is None) for load in observer.loads] == [
            ("sha256:a", True),
            ("sha256:bad", False),
        ]


async def test_pins_merges_and_tiers_are_told_of_as_they_are() -> None:
    budgets = {"host_budget_bytes": 50, "merge_budget_bytes": 40, "prefix_blocks": 4}
    async with engine(command(**budgets, adapter_budget_bytes=100)) as (client, observer):
        assert client.hello.host_budget_bytes == 50
        assert client.hello.merge_budget_bytes == 40
        assert client.hello.prefix_blocks == 4
        a = AdapterRef("sha256:a", json.dumps({"nbytes": 30, "merge_nbytes": 40}))
        b = AdapterRef("sha256:b", json.dumps({"nbytes": 20, "virtual": 6, "merge_nbytes": 1}))
        await client.pin(b, True)
        assert client.adapters["sha256:b"].pinned
        assert client.adapters["sha256:b"].prefix_blocks == 2
        await client.merge(a)
        assert client.adapters["sha256:a"].merged_bytes == 40
        with pytest.raises(Refusal) as failed:
            await client.merge(b)
        assert failed.value.reason == "MERGE_BUDGET"
        alone = await drain(client.submit(ask(1, [1], adapters=[b])))
        assert alone == (continuation([1], [("sha256:b", 1.0)], 5, virtual=6), "length")
        await client.unmerge("sha256:a")
        assert client.adapters["sha256:a"].merged_bytes == 0
        await client.load(AdapterRef("sha256:c", json.dumps({"nbytes": 70})))
        assert client.adapters["sha256:a"].state == "host"
        assert client.adapters["sha256:a"].host_bytes == 30
        await client.load(a)
        assert [load.tier for load in observer.loads] == ["disk", "disk", "disk", "host"]
        assert [(done.merged, done.error is None) for done in observer.merges] == [
            (True, True),
            (True, False),
            (False, True),
        ]


async def test_kill_9_costs_only_the_running_requests_and_the_engine_comes_back() -> None:
    async with engine(command(step_seconds=0.002, num_blocks=400)) as (client, observer):
        ref = AdapterRef("sha256:a", json.dumps({"nbytes": 5}))
        await client.load(ref)
        done = await drain(client.submit(ask(100, [9], 2)))
        streams = [client.submit(ask(i, [i], 150, adapters=[ref])) for i in range(8)]
        for stream in streams:
            await stream.take()
        slow = AdapterRef("sha256:slow", json.dumps({"seconds": 60}))
        load = asyncio.ensure_future(client.load(slow))
        await observer.until(lambda: "sha256:slow" in client.adapters)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        results = await asyncio.gather(*map(drain, streams))
        assert [outcome for _, outcome in results] == ["ENGINE_RESTARTED"] * 8
        with pytest.raises(Refusal) as failed:
            await load
        assert failed.value.reason == "ENGINE_RESTARTED"
        assert await drain(client.submit(ask(50, [1]))) == ([], "ENGINE_RESTARTED")
        await observer.until(lambda: client.ready)
        assert (client.restarts, observer.restarts, observer.readies) == (1, 1, 2)
        assert done == (continuation([9], [], 2), "length")
        assert await drain(client.submit(ask(51, [1]))) == (continuation([1], [], 5), "length")


async def test_what_was_resident_is_loaded_again_into_the_new_engine() -> None:
    async with engine(command()) as (client, observer):
        for name in "ab":
            await client.load(AdapterRef(f"sha256:{name}", json.dumps({"nbytes": 5})))
        await client.unload("sha256:b")
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await observer.until(lambda: len(observer.loads) == 3)
        assert observer.loads[-1].digest == "sha256:a"
        assert set(client.adapters) == {"sha256:a"}


async def test_a_model_that_fails_step_after_step_is_started_afresh() -> None:
    async with engine(command(fault_token=7)) as (client, observer):
        for id in range(3):
            assert await drain(client.submit(ask(id, [7]))) == ([], "ENGINE_FAULT")
        await observer.until(lambda: observer.readies == 2)
        assert await drain(client.submit(ask(9, [1]))) == (continuation([1], [], 5), "length")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (command(refuse="MODEL_NOT_FOUND"), "MODEL_NOT_FOUND"),
        (command(explode=True), "ENGINE_FAULT"),
        (command(limits={"max_running": 0}), "ENGINE_FAULT"),
        (command(num_blocks=0), "ENGINE_FAULT"),
        ([sys.executable, "-c", "raise SystemExit(1)"], "ENGINE_FAULT"),
        (["/nonexistent/engine"], "ENGINE_FAULT"),
    ],
)
async def test_an_engine_that_cannot_start_says_why(arguments: list[str], reason: str) -> None:
    client = EngineClient(arguments, Observer(), BACKOFF)
    with pytest.raises(Refusal) as failed:
        await client.start()
    assert failed.value.reason == reason
    assert "secret" not in failed.value.message
    assert not client.ready
    await client.stop()


async def test_a_restart_that_fails_is_reported_and_tried_again(tmp_path: Path) -> None:
    flag = tmp_path / "fail"
    code = (
        f"import os, sys; os.path.exists({str(flag)!r}) and sys.exit(1);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    async with engine([sys.executable, "-c", code, *command()]) as (client, observer):
        flag.touch()
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await observer.until(lambda: len(observer.fatals) >= 2)
        assert await drain(client.submit(ask(1, [1]))) == ([], "ENGINE_RESTARTED")
        flag.unlink()
        await observer.until(lambda: client.ready)
        assert await drain(client.submit(ask(2, [1]))) == (continuation([1], [], 5), "length")


async def test_stop_ends_open_streams_and_the_process() -> None:
    async with engine(command(step_seconds=0.002)) as (client, observer):
        stream = client.submit(ask(1, [1], 200))
        await stream.take()
        pid = client.pid
        assert pid is not None
        await client.stop()
        assert (await drain(stream))[1] == "DRAINING"
        assert await drain(client.submit(ask(2, [1]))) == ([], "DRAINING")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert observer.restarts == 0


def start_bare(**options: object) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """An engine process with a socket held by the test itself, past its Hello."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            command(step_seconds=0.001, **options),
            pass_fds=[theirs.fileno()],
            env={**os.environ, wire.SOCKET_VARIABLE: str(theirs.fileno())},
            stderr=subprocess.DEVNULL,
        )
    ours.settimeout(60)
    frames = wire.Frames()
    while not list(frames.feed(ours.recv(1 << 16))):
        pass
    return process, ours


def test_the_engine_leaves_when_the_front_is_gone_even_in_mid_work() -> None:
    process, ours = start_bare()
    ours.sendall(wire.encode(ask(1, [1], 200)))
    ours.recv(1)
    ours.close()
    assert process.wait(60) == 0


def test_a_garbage_frame_ends_the_engine() -> None:
    process, ours = start_bare()
    with ours:
        ours.sendall(b"\x04\x00\x00\x00\xff\xff\xff\xff")
        assert process.wait(60) == 5


def test_signals_for_the_front_do_not_end_the_engine() -> None:
    process, ours = start_bare()
    with ours:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        ours.sendall(wire.encode(ask(1, [1], 1)))
        assert ours.recv(1)
        ours.sendall(wire.encode(Shutdown()))
        assert process.wait(60) == 0


async def test_an_engine_that_sends_garbage_is_replaced(tmp_path: Path) -> None:
    flag = tmp_path / "garbage"
    flag.touch()
    code = textwrap.dedent(f"""
        import os, sys, socket
        if os.path.exists({str(flag)!r}):
            os.unlink({str(flag)!r})
            sys.path.insert(0, sys.argv[-2])
            from engine.oracle import OracleRunner
            from loraplex_server.engine.process import wire
            from loraplex_server.engine.messages import Hello
            s = socket.socket(fileno=int(os.environ[wire.SOCKET_VARIABLE]))
            s.sendall(wire.encode(Hello(OracleRunner().info, 64, 4, 1000, num_slots=4)))
            s.recv(1)
            s.sendall(b"\\xff" * 100)
            s.recv(1 << 20)
            s.recv(1 << 20)
        os.execv(sys.argv[1], sys.argv[1:])
    """)
    async with engine([sys.executable, "-c", code, *command()]) as (client, observer):
        assert await drain(client.submit(ask(1, [1]))) == ([], "ENGINE_RESTARTED")
        await observer.until(lambda: client.ready)
        assert await drain(client.submit(ask(2, [1]))) == (continuation([1], [], 5), "length")


def test_the_front_needs_neither_torch_nor_numpy_to_speak_to_the_engine() -> None:
    code = (
        "import sys, loraplex_server.engine.process.client, loraplex_server.engine.process.setup;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_process_that_was_started_early_is_the_first_engine() -> None:
    arguments = command()
    spawned = spawn(arguments)
    observer = Observer()
    client = EngineClient(arguments, observer, BACKOFF, spawned=spawned)
    try:
        await client.start()
        assert client.pids == [spawned.process.pid]
        os.kill(spawned.process.pid, signal.SIGKILL)
        await observer.until(lambda: client.restarts == 1 and client.ready)
        assert client.pid != spawned.process.pid
        assert spawned.process.poll() == -signal.SIGKILL
    finally:
        await client.stop()


def test_a_process_that_nobody_takes_over_ends_by_itself() -> None:
    spawned = spawn(command())
    spawned.abandon()
    assert spawned.process.wait(30) == 0
