"""Limits of principals: what is accepted, when a refused caller may come back, what is charged."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.limits.buckets import Bucket
from loraplex_server.access.limits.quotas import PAUSE_SECONDS, UNCOMPUTED, Allowance, Quotas
from loraplex_server.access.principals import EVERYBODY, Principal, PrincipalLimits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def principal(name: str = "search", **limits: Any) -> Principal:
    return Principal(name, limits=PrincipalLimits(**limits))


def quotas(clock: Clock | None = None, requests: int = 100, tokens: int = 10_000) -> Quotas:
    return Quotas(requests, tokens, clock or Clock())


def refused(use: Any, *args: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        use(*args)
    assert caught.value.reason is Reason.QUOTA_EXCEEDED
    return caught.value


def spend(place: Allowance, error: BaseException, prompt: int) -> None:
    """A request that takes its prompt's tokens and then ends with an error."""
    allowance = place.__enter__()
    allowance.prompt(prompt)
    allowance.__exit__(type(error), error, None)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    limit=st.integers(1, 600),
    start=st.sampled_from([0.0, 1e9, 0.125]),
)
def test_in_any_span_of_time_no_more_than_the_limit_is_taken_and_the_told_wait_is_exact(
    seed: int, limit: int, start: float
) -> None:
    rng = random.Random(seed)
    now, bucket, taken = start, Bucket(limit, start), list[tuple[float, int]]()
    for _ in range(60):
        units = rng.choice([1, 1, 1 + rng.randrange(limit)])
        wait = bucket.wait(units, now)
        if wait == 0.0:
            bucket.take(units, now)
            taken.append((now, units))
        elif rng.random() < 0.5:
            early = now + wait * 0.99
            assert bucket.wait(units, early) > 0, "the told wait is too long"
            now = early + wait * 0.0101
            assert bucket.wait(units, now) == 0.0, "the told wait is too short"
            continue
        now += rng.choice([0.0, rng.random(), 60 * rng.random()])
    for first in range(len(taken)):
        total = 0
        for at, units in taken[first:]:
            total += units
            assert total <= limit * (1 + (at - taken[first][0]) / 60) + 1e-3


def test_what_can_never_be_there_is_never_waited_for() -> None:
    assert Bucket(10, 0.0).wait(11, 0.0) == math.inf
    assert Bucket(10, 0.0).wait(10, 0.0) == 0.0
    assert Bucket(0, 0.0).wait(1, 1e9) == math.inf


def test_a_clock_that_goes_backwards_gives_nothing() -> None:
    bucket = Bucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.wait(1, 50.0) == pytest.approx(1.0)
    assert bucket.wait(1, 100.0) == pytest.approx(1.0)


def test_the_refusal_names_the_principal_the_limit_and_the_time() -> None:
    clock = Clock()
    limited, of = quotas(clock), principal(requests_per_minute=2)
    for _ in range(2):
        with limited.enter(of):
            pass
    error = refused(limited.enter, of)
    assert error.subject.name == "principal:search"
    assert error.field == "requests_per_minute"
    assert "2 requests a minute" in error.message
    assert error.retry_seconds == pytest.approx(30.0)
    clock.now += 29.9
    refused(limited.enter, of)
    clock.now += 0.1
    with limited.enter(of):
        pass


def test_generated_tokens_overdraw_and_later_requests_wait_for_the_refill() -> None:
    clock = Clock()
    limited, of = quotas(clock), principal(tokens_per_minute=600)
    with limited.enter(of) as allowance:
        allowance.prompt(500)
        allowance.begin()
        allowance.generated(1000)  # 900 more than there were: nothing is cut
    error = refused(limited.enter, of)
    assert error.field == "tokens_per_minute"
    assert error.retry_seconds == pytest.approx(90.1)  # 900 overdrawn and one, at 10 a second
    clock.now += 90.1
    with limited.enter(of) as allowance:
        allowance.prompt(1)
        assert refused(allowance.prompt, 600).retry_seconds == pytest.approx(60.0)


def test_a_prompt_beyond_a_whole_minute_is_refused_without_a_time() -> None:
    limited, of = quotas(), principal(tokens_per_minute=100)
    with pytest.raises(Refusal) as caught, limited.enter(of) as allowance:
        allowance.prompt(101)
    assert caught.value.retry_seconds == math.inf
    assert "never" in caught.value.message
    with limited.enter(of) as allowance:
        allowance.prompt(100)


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.name)
def test_a_request_that_nothing_was_computed_of_costs_nothing(reason: Reason) -> None:
    limited, of = quotas(), principal(requests_per_minute=1, tokens_per_minute=50)
    spend(limited.enter(of), Refusal(reason, "x"), prompt=50)
    if reason in UNCOMPUTED:
        with limited.enter(of) as allowance:
            allowance.prompt(50)
    else:
        assert refused(limited.enter, of).field == "requests_per_minute"


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), ValueError()])
def test_a_request_that_ends_early_frees_its_place_and_pays_for_what_was_produced(
    error: BaseException,
) -> None:
    of = principal(concurrent_requests=1, tokens_per_minute=100, queue_share=0.01)
    limited = quotas()
    allowance = limited.enter(of).__enter__()
    allowance.prompt(30)
    allowance.begin()
    allowance.generated(7)
    assert refused(limited.enter, of).field == "concurrent_requests"
    allowance.__exit__(type(error), error, None)
    with limited.enter(of) as allowance:
        assert refused(allowance.prompt, 64).field == "tokens_per_minute"
        allowance.prompt(63)


def test_an_engine_that_is_lost_after_the_begin_gives_nothing_back() -> None:
    limited, of = quotas(), principal(requests_per_minute=1)
    allowance = limited.enter(of).__enter__()
    allowance.begin()
    error = Refusal(Reason.ENGINE_RESTARTED, "x")
    allowance.__exit__(Refusal, error, None)
    assert refused(limited.enter, of).field == "requests_per_minute"


def test_a_share_of_the_places_and_of_the_waiting_tokens() -> None:
    limited, of = quotas(requests=10, tokens=1000), principal(queue_share=0.2)
    with limited.enter(of) as first, limited.enter(of) as second:
        error = refused(limited.enter, of)
        assert (error.field, error.retry_seconds) == ("queue_share", PAUSE_SECONDS)
        first.prompt(900)  # of any size, since it waits alone
        assert refused(second.prompt, 1).field == "queue_share"
        first.begin()
        second.prompt(200)
        with limited.enter(principal("other", queue_share=0.2)) as other:
            other.prompt(200)
    with limited.enter(of) as again:
        again.prompt(200)


@pytest.mark.parametrize(("share", "places"), [(0.0, 0), (1e-9, 1), (0.19, 1), (1.0, 10)])
def test_the_smallest_share_is_one_place(share: float, places: int) -> None:
    limited, of = quotas(requests=10), principal(queue_share=share)
    held: list[Allowance] = []
    for _ in range(places):
        held.append(limited.enter(of).__enter__())
    assert refused(limited.enter, of).field == "queue_share"


def test_a_changed_limit_applies_at_once_and_what_was_used_stays_used() -> None:
    clock = Clock()
    limited, of = quotas(clock), principal(requests_per_minute=10)
    for _ in range(10):
        with limited.enter(of):
            pass
    refused(limited.enter, of)
    more = replace(of, limits=PrincipalLimits(requests_per_minute=600))
    assert refused(limited.enter, more).retry_seconds == pytest.approx(0.1)
    clock.now += 0.1
    with limited.enter(more):
        pass
    with limited.enter(replace(of, limits=PrincipalLimits())):
        pass
    fewer = replace(of, limits=PrincipalLimits(requests_per_minute=1))
    with limited.enter(fewer):
        refused(limited.enter, fewer)
    none = replace(of, limits=PrincipalLimits(requests_per_minute=0))
    assert refused(limited.enter, none).retry_seconds == math.inf
    with limited.enter(fewer):
        pass


def test_callers_that_are_not_identified_have_no_limits_and_no_state() -> None:
    limited = quotas(requests=0)
    strict = replace(EVERYBODY, limits=PrincipalLimits(requests_per_minute=0))
    for caller in (EVERYBODY, strict):
        with limited.enter(caller) as first, limited.enter(caller) as second:
            assert first is second
            first.prompt(1 << 40)
            first.generated(1 << 40)
    assert len(limited) == 0


def test_the_state_of_principals_is_bounded_and_forgotten() -> None:
    clock = Clock()
    limited = quotas(clock)
    for number in range(500):
        with limited.enter(principal(f"p{number}", requests_per_minute=1)):
            pass
    assert len(limited) == 500
    clock.now += 61  # every bucket is full again
    with limited.enter(principal("p1", requests_per_minute=1)):
        assert len(limited) == 1
        limited.retain([])
        assert len(limited) == 1, "its request still runs"
    limited.retain(["p1"])
    assert len(limited) == 1
    refused(limited.enter, principal("p1", requests_per_minute=1))
    limited.retain(["another"])
    assert len(limited) == 0


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_whatever_happens_places_are_conserved(seed: int) -> None:
    rng = random.Random(seed)
    clock = Clock()
    limited = quotas(clock, requests=8)
    people = [
        principal("a", concurrent_requests=3, queue_share=0.5),
        principal("b", tokens_per_minute=500, queue_share=0.25),
        principal("c", requests_per_minute=30),
    ]
    held: list[tuple[str, Allowance]] = []
    for _ in range(80):
        clock.now += rng.random()
        who = rng.choice(people)
        if rng.random() < 0.5:
            try:
                allowance = limited.enter(who).__enter__()
            except Refusal:
                continue
            held.append((who.name, allowance))
            if rng.random() < 0.7:
                try:
                    allowance.prompt(rng.randrange(1, 600))
                except Refusal as error:
                    held.pop()
                    allowance.__exit__(type(error), error, None)
                    continue
            if rng.random() < 0.5:
                allowance.begin()
                allowance.generated(rng.randrange(50))
        elif held:
            _, allowance = held.pop(rng.randrange(len(held)))
            error = Refusal(rng.choice(list(Reason)), "x") if rng.random() < 0.5 else None
            allowance.__exit__(type(error) if error else None, error, None)
        for name in "abc":
            use = limited._uses.get(name)
            assert (use.active if use else 0) == sum(each == name for each, _ in held)
    for _, allowance in held:
        allowance.__exit__(None, None, None)
    clock.now += 1e6
    with limited.enter(principal("last")):
        assert len(limited) == 1, "something is still held"
    assert all(not use.waiting_tokens for use in limited._uses.values())
