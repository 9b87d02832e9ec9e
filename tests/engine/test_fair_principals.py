"""Principals get their shares whatever others send, and however many adapters they use for it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine.driving import GREEDY
from engine.simulation import Arrival, Simulation, p95, steadily
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.batching.fair_queue import KNOWN, NEW_COST, Account, FairQueue
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.batching.sampler import Draw
from loraplex_server.engine.messages import Submit

ROOMY = {"max_waiting": 4000, "max_waiting_tokens": 1 << 20, "max_queue_seconds": 0.0}


def of(principal: str, weight: float = 1.0, **fields: Any) -> dict[str, Any]:
    """Fields of arrivals of a principal."""
    return {"fields": (("principal", principal), ("weight", weight)), **fields}


def request(number: int, principal: str, account: str = "_base", weight: float = 1.0) -> Request:
    submit = Submit(
        number, [1] * 4, 4, sampling=GREEDY, account=account, principal=principal, weight=weight
    )
    return Request(submit, (float(number), number), float(number), Draw(submit.sampling, [1] * 4))


def waits(simulation: Simulation, principal: str) -> list[float]:
    """Times to the first token of a principal's requests, all of which must have one."""
    return [
        course.first_token
        for course in simulation.courses.values()
        if dict(course.asked.fields).get("principal") == principal
    ]


def work(simulation: Simulation, principal: str, begin: float, end: float) -> int:
    """Number of tokens that were generated for a principal in a span of time."""
    return sum(
        begin <= at < end
        for course in simulation.courses.values()
        if dict(course.asked.fields).get("principal") == principal
        for at in course.tokens
    )


def test_ten_principals_that_fill_the_server_leave_an_eleventh_its_wait_with_the_same_base() -> (
    None
):
    """Everybody uses the base: without principals all of it would be one account."""
    light = steadily(0.93, 12, 1.37, **of("light"))
    alone = Simulation(**ROOMY)
    alone.simulate(light)
    heavy = [each for i in range(10) for each in steadily(10, 13, 0.01 * i, **of(f"heavy-{i}"))]
    beside = Simulation(**ROOMY)
    beside.simulate([*light, *heavy], until=14)
    assert p95(waits(beside, "light")) <= 5 * p95(waits(alone, "light"))
    together = Simulation(**ROOMY)
    nobody = [Arrival(each.at, prompt=each.prompt) for each in [*light, *heavy]]
    together.simulate(nobody, until=14)
    first = [c.first_token for c in together.courses.values() if c.tokens]
    assert p95(first) > 20 * p95(waits(alone, "light")), "the load is no load"


@pytest.mark.parametrize("adapters", [1, 40])
def test_a_share_does_not_grow_with_the_number_of_adapters(adapters: int) -> None:
    simulation = Simulation(**ROOMY, max_running=16)
    many = [Arrival(i / 40, account=f"adapter-{i % adapters}", **of("many")) for i in range(40 * 9)]
    one = steadily(40, 9, 0.003, account="adapter", **of("one"))
    simulation.simulate([*many, *one], until=9)
    shares = [work(simulation, name, 3, 9) for name in ("many", "one")]
    assert min(shares) > 0
    assert max(shares) < 1.25 * min(shares)


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.5])
def test_principals_are_served_by_their_weights(weight: float) -> None:
    simulation = Simulation(**ROOMY, max_running=16)
    first = steadily(60, 10, account="x", **of("first", weight))
    second = steadily(60, 10, 0.003, account="x", **of("second"))
    simulation.simulate([*first, *second], until=10)
    served = work(simulation, "first", 4, 10) / weight, work(simulation, "second", 4, 10)
    assert max(served) < 1.3 * min(served)


def test_within_a_principal_adapters_share_by_their_own_weights() -> None:
    simulation = Simulation(**ROOMY, max_running=8, fair_weights={"a": 3.0})
    loads = [steadily(40, 10, 0.001 * i, account=a, **of("p")) for i, a in enumerate("ab")]
    simulation.simulate([each for load in loads for each in load], until=10)
    a, b = (simulation.work(account, 3, 10) for account in "ab")
    assert a / 3 < 1.3 * b
    assert b < 1.3 * a / 3


def test_callers_that_are_not_identified_are_compared_with_principals_by_account() -> None:
    simulation = Simulation(**ROOMY, max_running=16)
    loads = [steadily(40, 9, 0.001, **of("p")), steadily(40, 9, account="adapter")]
    simulation.simulate([each for load in loads for each in load], until=9)
    shares = [work(simulation, "p", 3, 9), simulation.work("adapter", 3, 9)]
    assert max(shares) < 1.25 * min(shares)


def test_principals_with_an_adapter_of_one_name_have_accounts_of_their_own() -> None:
    queue = FairQueue({})
    one, two = request(1, "p", "x"), request(2, "q", "x")
    for each in (one, two):
        queue.join(each)
    assert one.account is not two.account
    assert one.account is not None
    one.account.charge(one, 4)
    assert [top.counter for top in queue.waiting] == [4.0, 0.0]
    assert queue.first() == (two, False)


def test_a_forecast_counts_what_other_principals_have_waiting_before_and_no_more() -> None:
    """The sixth request of a principal waits for its own and for as much of each of the others."""
    simulation = Simulation(**{**ROOMY, "max_running": 8})
    for i in range(10):
        for _ in range(20):
            simulation.arrive(Arrival(0.0, account=f"adapter-{i % 3}", **of(f"heavy-{i}")))
    simulation.simulate([], until=3.0)
    core, queue = simulation.core, simulation.core._scheduler.queue
    ids = [simulation.arrive(Arrival(simulation.now, account="a", **of("light"))) for _ in range(6)]
    waits = (core._forecast._wait_seconds(core._requests[id]) for id in (ids[0], ids[-1]))
    first, last = waits
    assert first == 0.0, "its principal has the smallest counter"
    behind_all = core._forecast._load([*queue]).cost / core._rates.work_rate
    assert 0 < last < 0.8 * behind_all
    simulation.simulate([], until=80.0)
    took = simulation.courses[ids[-1]].first_token
    assert last / 2 < took < 2 * last


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_whatever_happens_no_request_of_a_principal_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    queue = FairQueue({"0": 3.0})
    waiting: dict[int, Request] = {}
    running: list[Request] = []
    for number in range(300):
        match rng.choice(["join", "join", "start", "start", "end", "preempt", "drop", "charge"]):
            case "join":
                principal, account = rng.choice(["", "p", "q"]), str(rng.randrange(4))
                one = request(number, principal, account, rng.choice([1.0, 2.0]))
                queue.join(one)
                waiting[number] = one
            case "start" if waiting:
                barred = [top for top in queue.waiting if rng.random() < 0.2]
                found = queue.first(barred)
                if found is None:
                    assert len(barred) == len(queue.waiting)
                    continue
                assert found[0].account is not None
                assert found[0].account.top not in barred
                queue.take(found[0])
                running.append(waiting.pop(found[0].id))
            case "end" if running:
                queue.leave(running.pop(rng.randrange(len(running))))
            case "preempt" if running:
                one = running.pop(rng.randrange(len(running)))
                queue.put_back(one)
                waiting[one.id] = one
            case "drop" if waiting:
                queue.drop(waiting.pop(rng.choice(sorted(waiting))))
            case "charge" if running:
                one = rng.choice(running)
                assert one.account is not None
                one.account.charge(one, rng.randrange(5))
        assert sorted(each.id for each in queue) == sorted(waiting)
        tops = {each.account.top for each in waiting.values() if each.account}
        assert set(queue.waiting) == tops
        assert sum(top.waiting for top in tops) == len(queue) == len(waiting)
        accounts = {each.account for each in waiting.values()}
        assert queue.waiting_accounts == len(accounts)
        for name, whole in queue._principals.items():
            mine = [r for r in [*running, *waiting.values()] if r.submit.principal == name]
            assert whole.open == len(mine)
            assert sum(_paid(r) for r in mine) <= whole.counter * 2 + 1e-6


def _paid(one: Request) -> float:
    prompt = min(one.charged, one.prompt_len)
    return prompt + NEW_COST * (one.charged - prompt)


def test_principals_that_are_gone_are_forgotten() -> None:
    queue = FairQueue({})
    for number in range(5 * KNOWN):
        one = request(number, f"p{number}")
        queue.join(one)
        queue.take(one)
        queue.leave(one)
    assert len(queue._accounts) <= 2 * KNOWN + 1
    assert len(queue._principals) <= 2 * KNOWN + 1


def test_a_principal_that_was_forgotten_and_returns_has_a_consistent_account() -> None:
    queue = FairQueue({})
    one = request(1, "p")
    queue.join(one)
    queue.take(one)
    queue.leave(one)
    del queue._principals["p"]
    two = request(2, "p")
    queue.join(two)
    assert isinstance(two.account, Account)
    assert two.account.top is queue._principals["p"]
    assert queue.first() == (two, False)
