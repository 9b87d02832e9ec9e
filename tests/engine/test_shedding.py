"""Host memory is taken back from adapters that nobody needs, and requests are not affected."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, command, continuation
from engine.test_process import ask, drain, engine
from loraplex_server.engine.group.face import EngineMember
from loraplex_server.engine.group.shedding import HostShedding
from loraplex_server.engine.messages import AdapterRef, Load


def engine_with(device: str = "cpu", budget: int = 60, host: int = 300) -> Engine:
    runner = OracleRunner(
        num_blocks=200,
        adapter_budget_bytes=budget,
        host_budget_bytes=host,
        num_slots=8,
        device=device,
    )
    return Engine(runner)


def load(driven: Engine, *names: str) -> None:
    for name in names:
        driven.core.control(Load(len(driven.controls) + 1, adapter(name, nbytes=60)))
        driven.run()


def in_host(driven: Engine) -> list[str]:
    table = driven.core.adapters.statuses()
    return [s.digest.removeprefix("sha256:") for s in table if s.state == "host"]


def test_what_was_not_used_for_longest_leaves_first_and_only_as_much_as_is_asked() -> None:
    driven = engine_with()
    load(driven, *"abcd")  # d is on the device
    assert in_host(driven) == ["a", "b", "c"]
    driven.core.limit_host(130)
    assert driven.step() is not None, "the new table is not reported"
    assert in_host(driven) == ["b", "c"]
    load(driven, "e")
    assert in_host(driven) == ["c", "d"], "the limit does not last"
    driven.core.limit_host(None)
    load(driven, "f")
    assert in_host(driven) == ["c", "d", "e"]
    driven.core.check_books()


@pytest.mark.parametrize("limit", [0, 1, 59])
def test_nothing_is_kept_or_read_ahead_below_the_size_of_an_adapter(limit: int) -> None:
    driven = engine_with()
    driven.core.limit_host(limit)
    load(driven, *"ab")
    assert in_host(driven) == []
    for number, name in enumerate("abc", 1):
        driven.submit(number, [1, 2], 3, adapters=[adapter(name, nbytes=60)])
    driven.run()
    for number, name in enumerate("abc", 1):
        assert driven.tokens(number) == continuation([1, 2], [(f"sha256:{name}", 1.0)], 3)
    driven.core.check_books()


def test_the_budget_is_not_exceeded_by_a_larger_limit() -> None:
    driven = engine_with(host=60)
    driven.core.limit_host(1 << 40)
    load(driven, *"abc")
    assert in_host(driven) == ["b"]
    driven.core.check_books()


def test_adapters_that_requests_wait_for_stay() -> None:
    driven = engine_with(budget=60)
    load(driven, *"ab")  # a is in host memory
    driven.submit(1, [1], 40, adapters=[adapter("b", nbytes=60)])
    driven.step()
    driven.submit(2, [1], 3, adapters=[adapter("a", nbytes=60)])
    driven.core.limit_host(0)
    reads = len(driven.loader.started)
    driven.run()
    assert driven.tokens(2) == continuation([1], [("sha256:a", 1.0)], 3)
    assert len(driven.loader.started) == reads, "it was read again"


def test_memory_that_was_allocated_at_start_is_not_given_back() -> None:
    driven = engine_with(device="cuda:0")
    load(driven, *"abc")
    before = in_host(driven)
    driven.core.limit_host(0)
    assert in_host(driven) == before
    assert before


async def test_an_engine_process_gives_back_and_goes_on(tmp_path: Path) -> None:
    arguments = command(
        adapter_budget_bytes=60, host_budget_bytes=300, num_blocks=64, block_size=16, num_slots=4
    )
    refs = [
        AdapterRef(f"sha256:{name * 64}", f'{{"nbytes": 60}}{" " * number}')
        for number, name in enumerate("abcd")
    ]
    async with engine(arguments) as (client, observer):
        shed = HostShedding(lambda: [EngineMember("cpu", client)])
        for ref in refs:
            await client.load(ref)

        def held() -> int:
            return 0 if client.stats is None else client.stats.host_bytes

        await observer.until(lambda: held() == 180)
        shed.limit_host_memory(70)
        await observer.until(lambda: held() == 60)
        shed.limit_host_memory(1 << 40)
        await observer.until(lambda: held() == 0)
        tokens, outcome = await drain(client.submit(ask(1, [3, 4], adapters=[refs[0]])))
        assert outcome == "length"
        assert tokens == continuation([3, 4], [(refs[0].digest, 1.0)], 5)
        assert held() == 0
        shed.limit_host_memory(None)
        await client.load(refs[1])
        await observer.until(lambda: held() == 60)
        await client.unload(refs[1].digest)
        await asyncio.sleep(0)
    assert client.restarts == 0
