"""Long traffic is reduced to the right numbers, and its phases end in time."""

from __future__ import annotations

import itertools
import math
import time

import bench_load
import open_loop
import pytest
from bench.scripted_service import scripted
from load import Exchange
from loraplex.v1 import generation_pb2 as pb
from open_loop import Traffic
from workload import Job, Popularity, Span, Workload

WORKLOAD = Workload(
    Popularity.ZIPF, ("a0", "a1", "a2"), 1, Span(3, 6), Span(2, 4), Span(256, 300), seed=3
)


def exchange(error: str = "", taken: float = 1.0, tokens: int = 4) -> Exchange:
    """An exchange that began at 100 s; its tokens came evenly until it ended."""
    made = Exchange(Job("", (1,), 4), 100.0, 100.0 + taken, error=error)
    made.messages.append((100.0, pb.GenerateStreamResponse(started={}).SerializeToString()))
    for i in range(tokens):
        delta = pb.GenerateStreamResponse(delta=pb.GenerationDelta(token_ids=[i]))
        made.messages.append((100.0 + taken * (i + 1) / tokens, delta.SerializeToString()))
    return made


def test_complete_answers_are_counted_by_the_second_of_their_tokens() -> None:
    traffic = Traffic(began=99.0)
    traffic.add(exchange(taken=2.0), 30)
    assert (traffic.finished, list(traffic.gaps_s), list(traffic.first_s)) == (1, [0.5] * 3, [0.5])
    assert dict(traffic.tokens) == {1: 1, 2: 2, 3: 1}
    assert traffic.rate(1, 3) == 1.5


def test_tokens_of_incomplete_answers_do_not_count() -> None:
    traffic = Traffic(began=99.0)
    traffic.add(exchange(tokens=3), 30)
    traffic.add(exchange("DEADLINE_EXCEEDED", taken=30.0), 30)
    traffic.add(exchange("INTERNAL"), 30)
    assert traffic.rate(0, 10) == 0
    assert traffic.late == 1
    assert traffic.errors == {"WRONG_LENGTH": 1, "INTERNAL": 1}


def test_refusals_are_no_errors_and_have_a_time() -> None:
    traffic = Traffic(began=99.0)
    early = exchange("DEADLINE_EXCEEDED", taken=0.02)
    early.messages.clear()
    traffic.add(exchange("RESOURCE_EXHAUSTED", taken=0.01), 30)
    traffic.add(early, 30)
    assert list(traffic.refusals_s) == pytest.approx([0.01, 0.02])
    assert not traffic.errors
    assert not traffic.late


def test_requests_without_an_end_follow_the_workload() -> None:
    jobs = list(itertools.islice(open_loop.endless(WORKLOAD), 200))
    assert jobs == list(itertools.islice(open_loop.endless(WORKLOAD), 200))
    assert {len(job.token_ids) for job in jobs} == {3, 4, 5, 6}
    assert {job.output_tokens for job in jobs} == {2, 3, 4}
    assert {job.adapter for job in jobs} == {"a0", "a1", "a2"}
    assert len({job.token_ids for job in jobs}) == 200


async def test_an_open_loop_sends_at_its_rate_with_ordinary_sampling() -> None:
    async with scripted() as (service, target):
        began = time.perf_counter()
        traffic = await open_loop.opened(target, open_loop.endless(WORKLOAD), 100, 0.5, 20, seed=1)
        taken = time.perf_counter() - began
    assert 20 < traffic.finished < 90  # 50 are expected; the deviation of a Poisson process is 7
    assert taken < 5
    assert not traffic.errors
    assert service.seen[0].sampling.temperature == pytest.approx(0.7)
    assert service.seen[0].sampling.top_p == pytest.approx(0.95)


async def test_a_closed_loop_ends_after_its_time() -> None:
    async with scripted() as (service, target):
        traffic = await open_loop.closed(target, open_loop.endless(WORKLOAD), 3, 0.2)
    assert traffic.finished == len(service.seen) > 0
    assert service.most_running <= 3


def test_the_slope_is_that_of_the_line_of_least_squares() -> None:
    assert bench_load.slope([(0, 5), (1, 7), (2, 9)]) == pytest.approx(2)
    assert bench_load.slope([(0, 1), (1, 0), (2, 1)]) == pytest.approx(0)
    assert math.isnan(bench_load.slope([(0, 1)]))
