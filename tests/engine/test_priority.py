"""A request's priority moves it forward in the queue by a bounded time, so none is starved."""

from __future__ import annotations

import pytest
from engine.driving import Engine
from engine.oracle import OracleRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.batching.fair_queue import PRIORITY_SECONDS

STEP_SECONDS = 0.05
"""Duration of a step on the test's clock."""


@pytest.mark.fault("priority-starves")
@settings(max_examples=40, deadline=None)
@given(
    low=st.integers(-10, 10),
    high=st.integers(-10, 10),
    backlog=st.integers(0, 5),
    max_running=st.integers(1, 3),
)
def test_a_stream_of_a_higher_priority_delays_a_request_by_a_bounded_time(
    low: int, high: int, backlog: int, max_running: int
) -> None:
    """In every step as many requests of another priority arrive as can start."""
    engine = Engine(OracleRunner(num_blocks=200), max_running=max_running)
    id = 1
    for _ in range(backlog):
        id += 1
        engine.submit(id, [id % 400], 1, priority=high)
    begun = engine.clock.now
    engine.submit(1, [1], 1, priority=low)
    head_start = max(0, high - low) * PRIORITY_SECONDS
    # Those that arrive within the head start are served first, as many per step as arrive.
    bound = head_start + (backlog + 2) * STEP_SECONDS + 1e-6
    while engine.outcome(1) is None:
        assert engine.clock.now - begun <= bound, "the request is still waiting"
        for _ in range(max_running):
            id += 1
            engine.submit(id, [id % 400], 1, priority=high)
        engine.step()
        engine.clock.now += STEP_SECONDS
    assert engine.outcome(1) == "length"


@pytest.mark.fault("priority-starves")
def test_a_running_request_is_not_preempted_for_ever_by_later_ones_of_a_higher_priority() -> None:
    engine = Engine(OracleRunner(num_blocks=8), max_running=4)
    engine.submit(1, [1] * 4, 16, priority=-10)
    for id in range(2, 2000):
        if engine.outcome(1) is not None:
            break
        engine.submit(id, [id % 400] * 8, 8, priority=10)
        engine.step()
        engine.clock.now += 0.5
    assert engine.outcome(1) == "length"


def test_priority_decides_among_requests_that_arrive_together() -> None:
    engine = Engine(OracleRunner(num_blocks=100), max_running=1)
    engine.submit(1, [1], 1, priority=-10)
    engine.clock.now += 3.9
    engine.submit(2, [2], 1, priority=10)
    engine.step()
    assert (engine.outcome(1), engine.outcome(2)) == (None, "length")


def test_a_request_that_has_waited_longer_than_its_difference_is_served_first() -> None:
    engine = Engine(OracleRunner(num_blocks=100), max_running=1)
    engine.submit(1, [1], 1, priority=-10)
    engine.clock.now += 4.1
    engine.submit(2, [2], 1, priority=10)
    engine.step()
    assert (engine.outcome(1), engine.outcome(2)) == ("length", None)
