"""Requests that would not end before their deadlines are refused before they cost anything."""

from __future__ import annotations

import random

import pytest
from engine.simulation import Arrival, Costs, Simulation, p95, steadily

CAPACITY = 18.0
"""Requests per second that the simulated machine serves, of the usual lengths; tested below."""

ROOMY = {"max_waiting": 4000, "max_waiting_tokens": 1 << 20, "max_queue_seconds": 0.0}


def served(simulation: Simulation, begin: float, end: float) -> float:
    """Requests per second that ended well."""
    good = [c for c in simulation.courses.values() if c.outcome == "length"]
    return sum(begin <= (c.ended or 0.0) < end for c in good) / (end - begin)


def test_at_twice_the_capacity_the_goodput_is_the_capacity_and_refusals_are_at_once() -> None:
    alone = Simulation(**ROOMY)
    alone.simulate(steadily(2 * CAPACITY, 24), until=24)
    capacity = served(alone, 12, 24)
    assert capacity == pytest.approx(CAPACITY, rel=0.1)
    simulation = Simulation(**ROOMY)
    simulation.simulate(steadily(2 * CAPACITY, 24, patience=8.0), until=24)
    assert served(simulation, 12, 24) > 0.9 * capacity
    refused, wasted, work = [], 0, 0
    for course in simulation.courses.values():
        if course.outcome == "DEADLINE_UNMEETABLE" and not course.tokens:
            refused.append((course.ended or 0.0) - course.asked.at)
        if course.outcome not in ("length", None):
            wasted += len(course.tokens)
        work += len(course.tokens)
    assert wasted < 0.05 * work, "requests end at their deadlines after they have been computed"
    assert len(refused) > 100
    assert p95(refused) < 0.05


def test_little_is_computed_in_vain_when_a_burst_comes_with_short_deadlines() -> None:
    """Steps are short when it begins, and its first answers would take several times as long."""
    chance = random.Random(1)
    weights = [1 / (k + 1) for k in range(64)]
    simulation = Simulation(Costs(0.003, 0.0012, 0.0006), **ROOMY)
    arrivals, at = [], 0.0
    for rate, end in ((2.3, 30), (4.6, 60), (23.0, 90)):  # half of the capacity, all, five times
        while (at := at + chance.expovariate(rate)) < end:
            (account,) = chance.choices(range(64), weights)
            prompt, new = chance.randint(32, 256), chance.randint(16, 128)
            arrivals.append(Arrival(at, f"a{account}", prompt, new, patience=8.0))
    simulation.simulate(arrivals)
    courses = [c for c in simulation.courses.values() if c.asked.at > 60]
    vain = sum(len(c.tokens) for c in courses if c.outcome != "length")
    assert vain < 0.09 * sum(len(c.tokens) for c in courses)
    refused = [c for c in courses if c.outcome == "DEADLINE_UNMEETABLE"]
    later = [c for c in refused if (c.ended or 0.0) - c.asked.at > 0.5]
    assert len(refused) > 300
    assert len(later) <= 0.03 * len(refused)


def test_who_would_start_at_once_and_not_end_is_refused_if_others_wait() -> None:
    simulation = Simulation(**ROOMY)
    simulation.simulate(steadily(2 * CAPACITY, 8, account="heavy"), until=8)
    assert simulation.core._scheduler.queue
    outcomes = []
    for patience in (0.2, 30.0):
        id = simulation.arrive(Arrival(simulation.now, "light", patience=patience))
        simulation.simulate([], until=simulation.now + 0.1)
        outcomes.append(simulation.courses[id].outcome)
    assert outcomes == ["DEADLINE_UNMEETABLE", None]


def test_tokens_that_are_kept_in_the_cache_take_no_time() -> None:
    simulation = Simulation(**ROOMY)
    long = tuple(401 + i % 100 for i in range(4000))
    simulation.simulate([Arrival(0.0, "light", new=2, tokens=long)])
    begin = simulation.now
    simulation.simulate(steadily(2 * CAPACITY, 8, begin, account="heavy"), until=begin + 8)
    assert simulation.core._scheduler.queue
    outcomes = []
    for tokens in (long, long[1:]):  # kept, and not kept
        id = simulation.arrive(Arrival(simulation.now, "light", 0, 8, 1.0, tokens))
        simulation.simulate([], until=simulation.now + 1.0)
        outcomes.append(simulation.courses[id].outcome)
    assert outcomes == ["length", "DEADLINE_UNMEETABLE"]


def test_many_accounts_of_different_weight_are_refused_at_once_too() -> None:
    """The first ones get a small part of what they ask for: their waits depend on all others."""
    chance = random.Random(1)
    weights = [1 / (k + 1) for k in range(64)]
    arrivals, at = [], 0.0
    while (at := at + chance.expovariate(2 * CAPACITY)) < 60:
        (account,) = chance.choices(range(64), weights)
        prompt, new = chance.randint(32, 256), chance.randint(16, 128)
        arrivals.append(Arrival(at, f"a{account}", prompt, new, patience=15.0))
    simulation = Simulation(**ROOMY)
    simulation.simulate(arrivals, until=60)
    courses = [c for c in simulation.courses.values() if c.asked.at > 10]
    refused = [c for c in courses if c.outcome == "DEADLINE_UNMEETABLE"]
    later = [c for c in refused if (c.ended or 0.0) - c.asked.at > 0.5]
    late = [c for c in courses if c.outcome == "DEADLINE_EXCEEDED"]
    assert len(refused) > 500
    assert len(later) <= 0.02 * len(refused)
    assert sum(len(c.tokens) for c in late) < 0.02 * sum(len(c.tokens) for c in courses)


def test_a_burst_of_many_accounts_is_not_refused_for_the_pace_of_its_first_seconds() -> None:
    """A popular account gets little while the prompts of all others are computed first."""
    chance = random.Random(3)
    weights = [1 / (k + 1) for k in range(64)]
    simulation = Simulation(Costs(0.003, 0.0012, 0.0006), **ROOMY)

    def another() -> int:
        (account,) = chance.choices(range(64), weights)
        prompt, new = chance.randint(32, 256), chance.randint(16, 128)
        return simulation.arrive(Arrival(simulation.now, f"a{account}", prompt, new, 120.0))

    going = [another() for _ in range(64)]
    while simulation.now < 30:
        simulation.simulate([], until=simulation.now + 0.1)
        ended = [id for id in going if simulation.courses[id].ended is not None]
        going = [id for id in going if id not in ended] + [another() for _ in ended]
    outcomes = {course.outcome for course in simulation.courses.values()}
    assert outcomes == {"length", None}


def test_an_idle_server_refuses_nobody_however_short_the_deadline_is() -> None:
    simulation = Simulation(**ROOMY)
    simulation.simulate(steadily(2 * CAPACITY, 4), until=20)  # rates are known
    assert simulation.core.idle
    for patience in (0.001, 0.01, 0.1, 0.5):
        id = simulation.arrive(Arrival(simulation.now, new=400, patience=patience))
        simulation.simulate([])
        assert simulation.courses[id].outcome == "DEADLINE_EXCEEDED"


def test_a_light_account_is_not_refused_for_the_queue_of_another() -> None:
    simulation = Simulation(**ROOMY)
    heavy = steadily(2 * CAPACITY, 12, account="heavy")
    light = steadily(1, 8, 4.0, account="light", patience=2.0)
    simulation.simulate([*heavy, *light], until=16)
    ends = {c.outcome for c in simulation.courses.values() if c.asked.account == "light"}
    assert ends == {"length"}
    late = simulation.arrive(Arrival(simulation.now, "heavy", patience=2.0))
    simulation.simulate([], until=simulation.now + 0.2)
    assert simulation.courses[late].outcome == "DEADLINE_UNMEETABLE"


def test_who_waits_too_long_is_ended_before_its_deadline_and_costs_nothing() -> None:
    """Its deadline could be met when it arrived; then an account with a larger share came."""
    simulation = Simulation(**ROOMY, max_running=8, fair_weights={"large": 9.0})
    simulation.simulate(steadily(40, 4, account="other"), until=4)
    id = simulation.arrive(Arrival(simulation.now, "other", patience=20.0))
    simulation.simulate(steadily(40, 16, simulation.now, account="large"), until=25)
    course = simulation.courses[id]
    assert course.outcome == "DEADLINE_UNMEETABLE"
    assert not course.tokens
    assert course.ended is not None
    assert 18.0 < course.ended - course.asked.at < 20.0


def test_a_wait_beyond_the_setting_is_refused_as_an_overload() -> None:
    simulation = Simulation(**{**ROOMY, "max_queue_seconds": 3.0})
    simulation.simulate(steadily(2 * CAPACITY, 16), until=16)
    outcomes = {course.outcome for course in simulation.courses.values()}
    assert outcomes == {"length", "OVERLOADED", None}
    started = [c.first_token for c in simulation.courses.values() if c.tokens and c.asked.at > 8]
    assert p95(started) < 4.5
