"""A workload is what its settings say, and the same every time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from workload import Popularity, Span, Workload, arrivals, plan

NAMES = ("a0", "a1", "a2", "a3")
WORKLOAD = Workload(
    popularity=Popularity.UNIFORM,
    adapters=NAMES,
    requests=400,
    prompt_tokens=Span(3, 9),
    output_tokens=Span(5, 5),
    token_ids=Span(100, 110),
)


def test_the_same_settings_give_the_same_requests() -> None:
    assert plan(WORKLOAD) == plan(WORKLOAD)
    assert plan(WORKLOAD) != plan(replace(WORKLOAD, seed=1))


def test_lengths_and_token_ids_stay_in_their_ranges_and_fill_them() -> None:
    jobs = plan(WORKLOAD)
    assert {len(job.token_ids) for job in jobs} == set(range(3, 10))
    assert {job.output_tokens for job in jobs} == {5}
    assert {token for job in jobs for token in job.token_ids} == set(range(100, 111))


@pytest.mark.parametrize(
    ("popularity", "names"),
    [
        (Popularity.BASE, {""}),
        (Popularity.IDENTICAL, {"a0"}),
        (Popularity.UNIFORM, set(NAMES)),
        (Popularity.DISTINCT, set(NAMES)),
        (Popularity.ZIPF, set(NAMES)),
    ],
)
def test_popularity_names_its_adapters(popularity: Popularity, names: set[str]) -> None:
    jobs = plan(replace(WORKLOAD, popularity=popularity))
    assert len(jobs) == 400
    assert {job.adapter for job in jobs} == names


def test_distinct_gives_every_window_of_n_requests_n_adapters() -> None:
    jobs = plan(replace(WORKLOAD, popularity=Popularity.DISTINCT))
    for start in range(len(jobs) - 3):
        assert {job.adapter for job in jobs[start : start + 4]} == set(NAMES)


def test_zipf_prefers_the_first_names_and_more_so_when_steeper() -> None:
    counts = Counter(job.adapter for job in plan(replace(WORKLOAD, popularity=Popularity.ZIPF)))
    steep = replace(WORKLOAD, popularity=Popularity.ZIPF, zipf_alpha=3.0)
    steeper = Counter(job.adapter for job in plan(steep))
    assert counts["a0"] > counts["a1"] > counts["a3"]
    assert steeper["a0"] > counts["a0"]


def test_popularity_without_names_is_refused() -> None:
    with pytest.raises(ValueError, match="zipf"):
        plan(replace(WORKLOAD, popularity=Popularity.ZIPF, adapters=()))


def test_arrivals_are_ordered_and_come_at_the_rate() -> None:
    times = arrivals(2000, 5.0, seed=3)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000 / 5.0, rel=0.1)
    assert times != arrivals(2000, 5.0, seed=4)


@pytest.mark.parametrize("text", ["0", "5-4", "x", "-3", "3-"])
def test_a_span_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - int() and Span.parse word it differently
        Span.parse(text)


@pytest.mark.parametrize(("text", "span"), [("7", Span(7, 7)), ("2-9", Span(2, 9))])
def test_a_span_reads_what_it_writes(text: str, span: Span) -> None:
    assert Span.parse(text) == span
    assert str(span) == text
