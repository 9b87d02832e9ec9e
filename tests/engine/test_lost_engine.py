"""A lost engine: hung, killed repeatedly, out of descriptors, during a load, on another base."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from engine.oracle import OracleRunner, command, continuation
from engine.test_process import Observer, ask, drain
from loraplex_model.base.process.descriptors import MOST, raise_descriptor_limit
from loraplex_model.base.refusal import Refusal
from loraplex_server.engine.messages import AdapterRef, Hello, SamplingParams
from loraplex_server.engine.process.client import EngineClient
from loraplex_server.engine.process.identity import BaseChanged, differences
from loraplex_server.engine.process.limits import SupervisionLimits
from loraplex_server.engine.process.supervisor import EngineLost

BACKOFF = {"first_pause": 0.01, "longest_pause": 0.1}


@asynccontextmanager
async def supervised(
    arguments: list[str], **limits: Any
) -> AsyncIterator[tuple[EngineClient, Observer]]:
    observer = Observer()
    client = EngineClient(arguments, observer, limits=SupervisionLimits(**{**BACKOFF, **limits}))
    await client.start()
    try:
        yield client, observer
    finally:
        await client.stop()


def adapter(name: str, **options: object) -> AdapterRef:
    return AdapterRef(f"sha256:{name}", json.dumps({"nbytes": 5, **options}))


def kill(client: EngineClient, number: int = signal.SIGKILL) -> None:
    assert client.pid is not None
    os.kill(client.pid, number)


async def answers(client: EngineClient, ref: AdapterRef | None = None) -> bool:
    """Whether a request is answered, and right."""
    refs = [] if ref is None else [ref]
    result = await drain(client.submit(ask(time.monotonic_ns(), [3, 4], adapters=refs)))
    mix = [(each.digest, 1.0) for each in refs]
    return result == (continuation([3, 4], mix, 5), "length")


async def fails(work: Any) -> str:
    with pytest.raises(Refusal) as failed:
        await work
    return str(failed.value.reason)


class Ends:
    """The watched tasks that ended, as the event loop reports them."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._any = asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(self._handle)

    def _handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(context["exception"])
        self._any.set()

    async def first(self) -> BaseException:
        await asyncio.wait_for(self._any.wait(), 60)
        return self.errors[0]


def switched(tmp_path: Path, before: list[str], after: list[str]) -> tuple[list[str], Path]:
    """A command that runs `after` instead of `before` once the returned file exists."""
    flag = tmp_path / "switched"
    code = (
        "import json, os, sys; before, after = map(json.loads, sys.argv[1:]);"
        f"chosen = after if os.path.exists({str(flag)!r}) else before;"
        "os.execv(chosen[0], chosen)"
    )
    return [sys.executable, "-c", code, json.dumps(before), json.dumps(after)], flag


# hangs


@pytest.mark.fault("engine-hangs")
async def test_a_stopped_process_is_replaced() -> None:
    async with supervised(command(beat_seconds=0.05), silent=2.0) as (client, observer):
        await client.load(adapter("a"))
        stream = client.submit(ask(1, [1], 200))
        await stream.take()
        kill(client, signal.SIGSTOP)
        assert (await asyncio.wait_for(drain(stream), 30))[1] == "ENGINE_RESTARTED"
        assert not client.ready
        await observer.until(lambda: client.ready)
        assert [cause for cause, _ in observer.deaths] == ["silent"]
        assert await answers(client)
        await observer.until(lambda: "sha256:a" in client.adapters)


@pytest.mark.fault("engine-hangs")
async def test_a_step_that_does_not_end_is_ended() -> None:
    options = {"beat_seconds": 0.05, "hang_token": 7}
    async with supervised(command(**options), stuck=2.0) as (client, observer):
        stream = client.submit(ask(1, [7]))
        assert (await asyncio.wait_for(drain(stream), 30))[1] == "ENGINE_RESTARTED"
        await observer.until(lambda: client.ready)
        assert [cause for cause, _ in observer.deaths] == ["stuck"]
        assert await answers(client)


@pytest.mark.slow
@pytest.mark.fault("engine-hangs")
async def test_neither_long_steps_nor_an_idle_engine_count_as_hanging() -> None:
    options = {"beat_seconds": 0.05, "step_seconds": 0.3}
    async with supervised(command(**options), stuck=1.2) as (client, observer):
        assert await answers(client)  # five steps, 1.5 s
        await asyncio.sleep(1.8)
        assert await answers(client)
        assert observer.restarts == 0


@pytest.mark.fault("engine-hangs")
async def test_a_process_that_never_becomes_ready_is_given_up() -> None:
    waiting = [sys.executable, "-c", "import time; time.sleep(3600)"]
    client = EngineClient(waiting, Observer(), limits=SupervisionLimits(start=0.5))
    with pytest.raises(Refusal, match=r"not ready after 0\.5 s"):
        await asyncio.wait_for(client.start(), 30)
    assert client.pid is None


# again and again


@pytest.mark.fault("engine-lost-again")
async def test_an_engine_killed_while_it_restores_gets_the_rest_back() -> None:
    async with supervised(command(num_slots=8)) as (client, observer):
        refs = [adapter(name, seconds=0.2) for name in "abcde"]
        await client.pin(refs[0], True)
        for ref in refs[1:]:
            await client.load(ref)
        kill(client)
        await observer.until(lambda: observer.restarts == 1 and len(observer.loads) >= 6)
        kill(client)
        await observer.until(lambda: observer.restarts == 2 and client.ready)
        suspects = observer.deaths[1][1].suspects
        assert len(suspects) <= 2  # as many as the engine reads at a time
        await observer.until(
            lambda: (
                {d for d, s in client.adapters.items() if s.state == "resident"}
                == {ref.digest for ref in refs} - suspects
            )
        )
        assert client.adapters["sha256:a"].pinned
        for ref in refs:
            assert await answers(client, ref)
        assert client.quarantined == {}


@pytest.mark.fault("engine-lost-again")
async def test_pauses_grow_over_deaths_and_end_with_giving_up() -> None:
    dying = {"most_ends": 3, "give_up": 0.3, "first_pause": 0.1, "longest_pause": 0.2}
    async with supervised(command(crash_token=9), **dying) as (client, observer):
        ends = Ends()
        for id in range(4):
            await drain(client.submit(ask(id, [9, id])))
            if id < 3:
                await observer.until(lambda: client.ready)
        assert isinstance(await ends.first(), EngineLost)
        assert not client.ready
        assert await drain(client.submit(ask(99, [1]))) == ([], "ENGINE_RESTARTED")
        assert len(observer.deaths) == 4


@pytest.mark.fault("supervision-ends")
async def test_an_engine_that_is_lost_without_free_descriptors_comes_back() -> None:
    async with supervised(command()) as (client, observer):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.open(os.devnull, os.O_RDONLY)  # the lowest free number is above all in use
        os.close(spare)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
            kill(client)
            await observer.until(lambda: len(observer.fatals) >= 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await observer.until(lambda: client.ready)
        assert await answers(client)


@pytest.mark.fault("supervision-ends")
async def test_an_observer_that_raises_ends_nothing() -> None:
    async with supervised(command()) as (client, observer):

        def fail(*_: object) -> None:
            raise RuntimeError("a fault of the observer")

        observer.on_step = observer.on_restart = observer.on_death = fail  # type: ignore[assignment]
        assert await answers(client)
        kill(client)
        await observer.until(lambda: observer.readies == 2)
        assert await answers(client)


@pytest.mark.fault("supervision-ends")
async def test_the_end_of_a_thread_ends_the_engine_which_is_replaced() -> None:
    async with supervised(command()) as (client, observer):
        ending = client.load(adapter("bad", fail="exit"))
        assert await fails(asyncio.wait_for(ending, 30)) == "ENGINE_RESTARTED"
        await observer.until(lambda: client.ready)
        assert [cause for cause, _ in observer.deaths] == ["exit"]
        assert await answers(client, adapter("good"))


@pytest.mark.fault("supervision-ends")
async def test_processes_may_open_as_many_files_as_the_hard_limit_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        async with supervised(command()) as (client, _):
            assert client.pid is not None
            assert resource.prlimit(client.pid, resource.RLIMIT_NOFILE) == (most, hard)
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# what ends engines


@pytest.mark.fault("adapter-kills-engines")
@pytest.mark.fault("engine-lost-again")
@pytest.mark.parametrize(
    "doing",
    [
        "read",
        pytest.param("publish", marks=pytest.mark.slow),
        pytest.param("merge", marks=pytest.mark.slow),
        "publish_merge",
    ],
)
async def test_an_adapter_that_ends_each_engine_is_quarantined(doing: str) -> None:
    options = {"merge_budget_bytes": 100, "adapter_budget_bytes": 100}
    async with supervised(command(**options)) as (client, observer):
        good = adapter("good")
        await client.load(good)
        bad = adapter("bad", kills=doing, merge_nbytes=5)
        for deaths in (1, 2):
            order = client.merge(bad) if "merge" in doing else client.load(bad)
            assert await fails(order) == "ENGINE_RESTARTED"
            await observer.until(lambda: client.ready)
            assert observer.deaths[-1][1].suspects == {"sha256:bad"}
            assert await answers(client, good)
            assert len(observer.deaths) == deaths
        assert "2 times" in observer.deaths[-1][1].quarantined["sha256:bad"]
        for order in (client.load(bad), client.merge(bad), client.pin(bad, True)):
            assert await fails(order) == "ADAPTER_QUARANTINED"
        assert await drain(client.submit(ask(1, [1], adapters=[bad]))) == (
            [],
            "ADAPTER_QUARANTINED",
        )
        assert await answers(client, good)
        assert len(observer.deaths) == 2
        client.release("sha256:bad")
        assert await fails(client.merge(bad)) == "ENGINE_RESTARTED"


@pytest.mark.fault("adapter-kills-engines")
async def test_requests_for_an_adapter_that_ends_engines_end_two_and_no_more() -> None:
    async with supervised(command()) as (client, observer):
        bad, outcomes = adapter("bad", kills="publish"), []
        for id in range(3):
            outcomes += [(await drain(client.submit(ask(id, [1], adapters=[bad]))))[1]]
            await observer.until(lambda: client.ready)
        assert outcomes == ["ENGINE_RESTARTED", "ENGINE_RESTARTED", "ADAPTER_QUARANTINED"]
        assert len(observer.deaths) == 2


@pytest.mark.fault("adapter-kills-engines")
async def test_an_adapter_that_is_loaded_beside_the_cause_is_not_quarantined() -> None:
    async with supervised(command(host_budget_bytes=500)) as (client, observer):
        bad, slow = adapter("bad", kills="read", seconds=0.2), adapter("slow", seconds=0.3)
        for id in range(2):
            streams = [client.submit(ask(10 * id + n, [n], adapters=[r]))
                       for n, r in enumerate((slow, bad))]  # fmt: skip
            await asyncio.gather(*map(drain, streams))
            await observer.until(lambda: client.ready)
        assert observer.deaths[0][1].suspects == {"sha256:bad", "sha256:slow"}
        while "sha256:bad" not in client.quarantined:
            await drain(client.submit(ask(50, [1], adapters=[bad])))
            await observer.until(lambda: client.ready)
        assert client.quarantined.keys() == {"sha256:bad"}
        assert await answers(client, slow)


@pytest.mark.fault("adapter-kills-engines")
async def test_what_was_being_loaded_is_not_loaded_again_unasked() -> None:
    async with supervised(command()) as (client, observer):
        await client.load(adapter("good"))
        loading = asyncio.ensure_future(client.load(adapter("slow", seconds=30)))
        await observer.until(lambda: "sha256:slow" in client.adapters)
        kill(client)
        assert await fails(loading) == "ENGINE_RESTARTED"
        await observer.until(lambda: client.ready and "sha256:good" in client.adapters)
        assert await answers(client)
        assert client.adapters.keys() == {"sha256:good"}


@pytest.mark.fault("adapter-kills-engines")
async def test_a_request_that_ends_each_engine_is_refused_and_others_are_not() -> None:
    async with supervised(command(crash_token=9)) as (client, observer):
        for id in range(SupervisionLimits().request_deaths):
            bad = ask(id, [8, 9], deadline=time.monotonic() + 60 + id)
            assert (await drain(client.submit(bad)))[1] == "ENGINE_RESTARTED"
            await observer.until(lambda: client.ready)
            assert await answers(client)
        assert await drain(client.submit(ask(5, [8, 9]))) == ([], "REQUEST_QUARANTINED")
        assert len(observer.deaths) == SupervisionLimits().request_deaths
        assert await answers(client)


@pytest.mark.fault("adapter-kills-engines")
@pytest.mark.parametrize("load_first", [True, False])
async def test_an_adapter_is_not_blamed_for_a_request_that_ends_engines_beside_its_load(
    load_first: bool,
) -> None:
    async with supervised(command(crash_token=9)) as (client, observer):
        slow, id = adapter("slow", seconds=0.5), 0
        async with asyncio.timeout(60):
            outcome: str | None = ""
            while outcome != "REQUEST_QUARANTINED":  # both are sent again at the same time
                id += 2
                if load_first:
                    good = client.submit(ask(id, [1], adapters=[slow]))
                    await asyncio.sleep(0.1)
                    bad = client.submit(ask(id + 1, [8, 9]))
                else:
                    bad = client.submit(ask(id + 1, [8, 9]))
                    good = client.submit(ask(id, [1], adapters=[slow]))
                _, (_, outcome) = await asyncio.gather(drain(good), drain(bad))
                await observer.until(lambda: client.ready)
                assert client.quarantined == {}
        # One more if both requests ran at each end, before it is known which of them is the cause.
        assert len(observer.deaths) <= SupervisionLimits().request_deaths + 1
        assert await answers(client, slow)


@pytest.mark.fault("engine-lost-again")
async def test_a_replacement_that_takes_longer_than_the_first_process_is_given_more_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex_server.engine.process.supervisor.RESTART_FACTOR", 0.0)
    async with supervised(command(), restart=0.02, most_ends=50) as (client, observer):
        kill(client)
        await observer.until(lambda: client.ready and observer.readies == 2)
        assert "not ready after 0.02 s" in observer.fatals[0].message
        assert await answers(client)


# hostile values


@pytest.mark.fault("deadline-overflows")
@pytest.mark.parametrize("deadline", [3.6e11, float("inf"), float("nan")])
async def test_no_deadline_ends_the_engine(deadline: float) -> None:
    async with supervised(command()) as (client, observer):
        slow = adapter("slow", seconds=0.3)
        patient = client.submit(ask(1, [1], adapters=[slow], deadline=deadline))
        outcome = "DEADLINE_EXCEEDED" if deadline != deadline else "length"
        assert (await drain(patient))[1] == outcome
        await client.unload("sha256:slow", deadline=deadline)
        assert await answers(client, slow)
        assert observer.restarts == 0


# another base


@pytest.mark.fault("restarted-engine-other-base")
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vocab_size": 500}, "model.base.config.vocab_size: 512, now 500"),
        ({"fingerprint": "sha256:other"}, "model.base.fingerprint: oracle, now sha256:other"),
        ({"num_blocks": 65}, "num_blocks: 64, now 65"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_an_engine_that_comes_back_on_another_base_serves_nothing(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    program, flag = switched(tmp_path, command(), command(**change))
    async with supervised(program) as (client, observer):
        ends = Ends()
        flag.touch()
        kill(client)
        error = await ends.first()
        assert isinstance(error, BaseChanged)
        assert field in str(error)
        assert (client.ready, client.pid, observer.readies) == (False, None, 1)
        assert await drain(client.submit(ask(1, [1]))) == ([], "ENGINE_RESTARTED")


def test_what_other_processes_leave_of_a_gpu_is_no_part_of_the_base() -> None:
    hellos = {
        device: [
            Hello(OracleRunner(device=device, max_context=context).info, blocks, 4, 1000)
            for context, blocks in ((1024, 64), (1000, 63))
        ]
        for device in ("cpu", "cuda:0")
    }
    assert differences(*hellos["cuda:0"]) == []
    assert len(differences(*hellos["cpu"])) == 2


@pytest.mark.fault("restarted-engine-other-base")
async def test_a_changed_tokenizer_is_another_base(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("first")
    async with supervised(command(tokenizer_path=str(tmp_path))) as (client, observer):
        ends = Ends()
        kill(client)
        await observer.until(lambda: observer.readies == 2)
        assert await answers(client)
        (tmp_path / "tokenizer.json").write_text("second")
        kill(client)
        assert "tokenizer.json" in str(await ends.first())
        assert observer.readies == 2


@pytest.mark.fault("message-ends-engine")
async def test_a_request_that_cannot_be_handled_fails_alone() -> None:
    async with supervised(command(step_seconds=0.01, num_blocks=200)) as (client, observer):
        running = client.submit(ask(1, [1], 100))
        await running.take()
        broken = ask(2, [2], sampling=SamplingParams(logit_bias={1 << 63: 1.0}))
        assert await drain(client.submit(broken)) == ([], "ENGINE_FAULT")
        assert (await drain(running))[1] == "length"
        assert observer.restarts == 0
