"""Accounts get their shares whatever others send, and nobody waits for ever."""

from __future__ import annotations

import itertools
import random

import pytest
from engine.driving import GREEDY
from engine.simulation import Arrival, Simulation, p95, steadily
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.batching.fair_queue import KNOWN, NEW_COST, OLDEST_EVERY, FairQueue
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.batching.sampler import Draw
from loraplex_server.engine.messages import Submit

ROOMY = {"max_waiting": 4000, "max_waiting_tokens": 1 << 20, "max_queue_seconds": 0.0}


def request(number: int, account: str, at: float = 0.0, prompt: int = 4) -> Request:
    submit = Submit(number, [1] * prompt, 4, sampling=GREEDY, account=account)
    return Request(submit, (at, number), at, Draw(submit.sampling, submit.token_ids))


def waits(simulation: Simulation, account: str) -> list[float]:
    """Times to the first token of an account's requests, all of which must have one."""
    return [
        course.first_token
        for course in simulation.courses.values()
        if course.asked.account == account
    ]


@pytest.mark.parametrize("prompt", [128, 512])
def test_a_hundred_times_the_load_of_another_account_at_most_doubles_ones_wait(prompt: int) -> None:
    light = steadily(0.93, 12, 1.37, account="light", prompt=prompt)
    alone = Simulation(**ROOMY)
    alone.simulate(light)
    beside = Simulation(**ROOMY)
    beside.simulate([*light, *steadily(93, 13, account="heavy")], until=14)
    assert p95(waits(beside, "light")) <= 2 * p95(waits(alone, "light"))
    together = Simulation(**ROOMY)
    together.simulate(steadily(93, 4, prompt=prompt), until=6)
    first = [c.first_token for c in together.courses.values() if c.tokens]
    assert p95(first) > 4 * p95(waits(alone, "light")), "the load is no load"


@pytest.mark.parametrize(
    ("prompt", "new", "priority", "factor"),
    [(1000, 64, 0, 3), (16, 500, 0, 3), (2000, 2, 0, 3), (128, 64, 10, 2)],
)
def test_load_of_any_shape_leaves_the_wait_of_another_account_bounded(
    prompt: int, new: int, priority: int, factor: int
) -> None:
    light = steadily(0.93, 8, 1.37, account="light")
    alone = Simulation(**ROOMY)
    alone.simulate(light)
    beside = Simulation(**ROOMY)
    shape = {"prompt": prompt, "new": new, "fields": (("priority", priority),)}
    beside.simulate([*light, *steadily(40, 9, account="heavy", **shape)], until=10)
    assert p95(waits(beside, "light")) <= factor * p95(waits(alone, "light"))


def test_the_heavy_account_loses_little_of_its_throughput() -> None:
    heavy = steadily(50, 10, account="heavy")
    alone = Simulation(**ROOMY)
    alone.simulate(heavy, until=10)
    beside = Simulation(**ROOMY)
    beside.simulate([*heavy, *steadily(0.5, 10, 0.37, account="light")], until=10)
    light = beside.work("light", 3, 10)
    assert light > 0
    assert beside.work("heavy", 3, 10) + light > 0.85 * alone.work("heavy", 3, 10)


@pytest.mark.parametrize(("weight", "count"), [(1.0, 2), (3.0, 2), (1.0, 5)])
def test_accounts_whose_requests_wait_are_served_by_their_weights(
    weight: float, count: int
) -> None:
    """The bound of the VTC paper: counters of accounts that wait differ by two requests' cost."""
    most = 128 + NEW_COST * 64
    names = [f"account-{i}" for i in range(count)]
    simulation = Simulation(**ROOMY, max_running=16, fair_weights={names[0]: weight})
    for name in names:
        for _ in range(60):
            simulation.arrive(Arrival(0.0, account=name))
    queue = simulation.core._scheduler.queue
    while all(account.queue for account in queue._accounts.values()):
        simulation.simulate([], until=simulation.now + 0.1)
        counters = [each.counter for each in queue._accounts.values() if each.queue]
        if len(counters) == count:
            # A started request is charged as it is computed, so each of a running share is open.
            assert max(counters) - min(counters) <= (16 + 2) * most
    work = [simulation.work(name, 0, simulation.now) for name in names]
    shares = [served / each for served, each in zip(work, [weight, *[1.0] * 9], strict=False)]
    assert max(shares) < 1.25 * min(shares)


def test_no_account_saves_up_by_asking_for_nothing() -> None:
    simulation = Simulation(**ROOMY)
    busy = steadily(40, 12, account="busy")
    late = steadily(40, 6, 6.0, account="late")
    early = steadily(1, 1, account="late")  # its counter is small, and then it is idle for 5 s
    simulation.simulate([*busy, *late, *early], until=12)
    begin, end = 7.5, 12.0  # from when both wait
    shares = [simulation.work(name, begin, end) for name in ("busy", "late")]
    assert max(shares) < 1.25 * min(shares)


def test_what_was_found_in_the_cache_costs_nothing_and_a_second_time_neither() -> None:
    queue = FairQueue({})
    one = request(1, "a", prompt=10)
    queue.join(one)
    queue.take(one)
    account = one.account
    assert account is not None
    one.charged = 6  # as if found in the cache
    account.charge(one, 10)
    assert account.counter == 4
    account.charge(one, 10)
    account.charge(one, 8)
    assert account.counter == 4
    one.tokens.extend([7, 7])
    account.charge(one, 12)
    assert account.counter == 4 + 2 * NEW_COST


def test_new_accounts_that_keep_arriving_starve_nobody() -> None:
    """Each of them starts at the smallest counter, so counters alone would never come to `old`."""
    queue = FairQueue({})
    old = [request(number, "old", at=0.0) for number in (1, 2)]
    for each in old:
        queue.join(each)
    account = old[0].account
    assert account is not None
    account.counter = 1e9
    starts = 0
    queue._contest._last.counter = 0.0
    queue.join(request(3, "new-3", at=3.0))
    other = queue._accounts["", "new-3"]
    other.counter = 0.0  # as if it had come before the counter of `old` grew
    for number in range(4, 200):
        queue.join(request(number, f"new-{number}", at=float(number)))
        found = queue.first()
        assert found is not None
        queue.take(found[0])
        starts += 1
        if found[0] in old:
            old.remove(found[0])
        if not old:
            break
    assert starts == 2 * OLDEST_EVERY


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), accounts=st.integers(1, 6))
def test_whatever_happens_no_request_is_lost_and_counters_only_grow(
    seed: int, accounts: int
) -> None:
    rng = random.Random(seed)
    queue = FairQueue({"0": 3.0})
    waiting: dict[int, tuple[Request, int]] = {}
    running: list[Request] = []
    counters: dict[tuple[str, str], float] = {}
    starts = 0
    for number in range(300):
        match rng.choice(["join", "join", "start", "start", "end", "preempt", "drop", "charge"]):
            case "join":
                one = request(number, str(rng.randrange(accounts)), at=number - rng.randrange(3))
                queue.join(one)
                waiting[number] = one, starts
            case "start" if waiting:
                found = queue.first()
                assert found is not None
                queue.take(found[0])
                _, since = waiting.pop(found[0].id)
                running.append(found[0])
                starts += 1
                assert starts - since <= OLDEST_EVERY * (len(waiting) + number), "starved"
            case "end" if running:
                queue.leave(running.pop(rng.randrange(len(running))))
            case "preempt" if running:
                one = running.pop()
                queue.put_back(one)
                waiting[one.id] = one, starts
            case "drop" if waiting:
                one, _ = waiting.pop(rng.choice(sorted(waiting)))
                queue.drop(one)
            case "charge" if running:
                one = rng.choice(running)
                assert one.account is not None
                one.account.charge(one, rng.randrange(5))
        assert sorted(each.id for each in queue) == sorted(waiting)
        assert len(queue) == len(waiting)
        opened = sum(account.open for account in queue._accounts.values())
        assert opened == len(waiting) + len(running)
        for name, account in queue._accounts.items():
            assert account.counter >= counters.get(name, 0.0)
            counters[name] = account.counter
            assert [each.order for each in account.queue] == sorted(
                each.order for each in account.queue
            )


def test_the_oldest_request_starts_within_some_starts_whatever_arrives() -> None:
    """With n requests before it in order, a request starts within (n + 1) * OLDEST_EVERY starts."""
    rng = random.Random(3)
    queue = FairQueue({str(i): 1000.0 for i in range(5)})
    for number in range(20):
        queue.join(request(number, "poor" if number % 2 else str(number % 5), at=0.0))
    for starts, number in enumerate(range(20, 400), 1):
        queue.join(request(number, str(rng.randrange(5)), at=float(number)))
        found = queue.first()
        assert found is not None
        queue.take(found[0])
        account = found[0].account
        assert account is not None
        account.charge(found[0], 4)
        for old in queue:
            assert old.id >= 20 or starts < (old.id + 1) * OLDEST_EVERY


def test_accounts_that_are_gone_are_forgotten() -> None:
    queue = FairQueue({})
    for number in range(5 * KNOWN):
        one = request(number, str(number))
        queue.join(one)
        queue.take(one)
        queue.leave(one)
    assert len(queue._accounts) <= 2 * KNOWN + 1


def test_an_account_with_all_places_gives_some_up_to_the_first_request_of_another() -> None:
    simulation = Simulation(**ROOMY, max_running=8)
    for _ in range(30):
        simulation.arrive(Arrival(0.0, account="heavy", new=500))
    simulation.simulate([], until=0.5)
    simulation.arrive(Arrival(simulation.now, account="light", new=4))
    begun = simulation.now
    simulation.simulate([], until=begun + 0.3)
    assert waits(simulation, "light")[0] < 0.2
    assert simulation.core._scheduler.preemptions == 1


def test_rows_of_a_heavy_account_go_on_beside_many_light_ones() -> None:
    """Light accounts whose prompts never end leave out the heavy one in every other step only."""
    simulation = Simulation(**ROOMY)
    for _ in range(32):
        simulation.arrive(Arrival(0.0, account="heavy", new=4000))
    simulation.simulate([], until=2.0)
    light = [
        each
        for i in range(8)
        for each in steadily(4, 8, 2.0 + i / 50, account=f"light-{i}", prompt=512, new=1)
    ]
    simulation.simulate(light, until=10.0)
    heavy = simulation.courses[1].tokens
    gaps = [after - before for before, after in itertools.pairwise(heavy) if after > 2.5]
    longest = simulation.costs.seconds(64, 512) + simulation.costs.seconds(64, 512)
    assert max(gaps) <= longest
    assert len(gaps) > 20
