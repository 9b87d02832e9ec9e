"""What sampling costs: the same tokens as the plain form, and no row makes others wait for long."""

from __future__ import annotations

import numpy as np
import pytest
from engine import sampler_reference as reference
from engine.driving import GREEDY, Engine
from engine.oracle import OracleRunner, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.batching.sampler import Draw, candidates, logprobs, sample
from loraplex_server.engine.batching.turns import SHARE
from loraplex_server.engine.messages import SamplingParams

VOCAB = 3000
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 5.0, 100.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 40, VOCAB - 1, VOCAB]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5, 100.0, 1e-30]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -2.0]),
    logit_bias=st.sampled_from([{}, {3: 5.0, 7: -100.0}]),
    seed=st.integers(0, 1 << 60),
)
LOGITS = st.builds(
    lambda seed, scale, ties: _logits(seed, scale, ties),
    st.integers(0, 1 << 30),
    st.sampled_from([0.0, 0.01, 1.0, 8.0, 1e6]),
    st.booleans(),
)


def _logits(seed: int, scale: float, ties: bool) -> np.ndarray:
    """Random logits [VOCAB]; with `ties`, few different values."""
    values = np.random.default_rng(seed).standard_normal(VOCAB) * scale
    return (np.round(values) if ties else values).astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            PARAMS,
            LOGITS,
            st.lists(st.integers(0, 50), max_size=30),
            st.lists(st.integers(0, 50), max_size=90),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_row_gets_the_token_of_the_plain_form(
    rows: list[tuple[SamplingParams, np.ndarray, list[int], list[int]]],
) -> None:
    draws = []
    for params, _, prompt, output in rows:
        draw = Draw(params, prompt)
        for token in output:
            draw.saw(token)
        draws.append(draw)
    logits = np.stack([row[1] for row in rows])
    expected = [reference.choose(p, prompt, out, line) for p, line, prompt, out in rows]
    assert sample(logits, draws) == expected


@settings(max_examples=200, deadline=None)
@given(
    logits=LOGITS,
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_the_candidates_are_those_of_the_plain_form_bit_for_bit(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float
) -> None:
    scaled = logits - logits.max()
    ids, weights = candidates(scaled, top_k, top_p, min_p)
    expected_ids, expected = reference.candidates(scaled, top_k, top_p, min_p)
    if expected_ids is None or ids is None:
        assert ids is expected_ids
    else:
        np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(weights, expected)


@settings(max_examples=100, deadline=None)
@given(logits=LOGITS, count=st.integers(1, 20), token=st.integers(0, VOCAB - 1))
def test_log_probabilities_are_those_of_the_plain_form(
    logits: np.ndarray, count: int, token: int
) -> None:
    assert logprobs(logits, token, count).top == reference.top_logprobs(logits, count)


FORWARD_SECONDS = 0.010
COSTLY_SECONDS = 0.0008
COSTLY = SamplingParams(temperature=100.0, top_p=0.999, seed=7)


def with_costs(monkeypatch: pytest.MonkeyPatch, rows: int, num_blocks: int = 400) -> Engine:
    """An engine whose clock advances by what passes and costly choices take."""
    engine = Engine(OracleRunner(num_blocks=num_blocks), max_running=rows)
    forward, choose = engine.runner.forward, Draw.choose

    def timed_forward(batch: object) -> np.ndarray:
        engine.clock.now += FORWARD_SECONDS
        return forward(batch)  # type: ignore[arg-type]

    def timed_choose(draw: Draw, logits: np.ndarray) -> int:
        if draw.params.top_p < 1.0:
            engine.clock.now += COSTLY_SECONDS
        return choose(draw, logits)

    monkeypatch.setattr(engine.runner, "forward", timed_forward)
    monkeypatch.setattr(Draw, "choose", timed_choose)
    return engine


@pytest.mark.usefixtures("pace")
@pytest.mark.fault("sampling-holds-step")
def test_63_costly_rows_delay_a_cheap_one_by_less_than_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = with_costs(monkeypatch, rows=64)
    for id in range(2, 65):
        engine.submit(id, [id], 12, sampling=COSTLY)
    engine.submit(1, [5], 100)
    times: list[float] = []
    while engine.outcome(1) is None:
        tokens = len(engine.tokens(1))
        engine.step()
        if len(engine.tokens(1)) > tokens:
            times.append(engine.clock.now)
    gaps = np.diff(times)
    assert len(gaps) == 99
    assert gaps.mean() < 1.5 * FORWARD_SECONDS
    assert gaps.max() <= (1 + SHARE) * FORWARD_SECONDS + COSTLY_SECONDS + 1e-9
    assert engine.tokens(1) == continuation([5], [], 100)
    # The costly rows took their turns meanwhile: none is far ahead of another.
    counts = [len(engine.tokens(id)) for id in range(2, 65)]
    assert min(counts) >= 5
    assert max(counts) - min(counts) <= 2


def test_costly_rows_among_themselves_are_not_slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = with_costs(monkeypatch, rows=8)
    for id in range(1, 9):
        engine.submit(id, [id], 5, sampling=COSTLY)
    for _ in range(5):
        engine.step()
    assert [engine.outcome(id) for id in range(1, 9)] == ["length"] * 8


@pytest.mark.usefixtures("pace")
@pytest.mark.fault("sampling-holds-step")
def test_rows_that_wait_for_their_turn_get_the_tokens_that_they_get_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = Engine()
    together = with_costs(monkeypatch, rows=6)
    settings = {id: SamplingParams(temperature=3.0, top_p=0.97, seed=id) for id in range(1, 6)}
    for id, sampling in settings.items():
        for engine in (alone, together):
            engine.submit(id, [id], 9, sampling=sampling)
        alone.run()
    together.submit(9, [9], 60, sampling=GREEDY)
    together.run()
    for id in settings:
        assert together.tokens(id) == alone.tokens(id)


def test_requests_can_be_aborted_and_expire_while_they_wait_for_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = with_costs(monkeypatch, rows=8)
    engine.submit(1, [1], 60)
    for id in range(2, 8):
        engine.submit(id, [id], 30, sampling=COSTLY, deadline=engine.clock.now + 0.05 * id)
    for _ in range(4):
        engine.step()
    turns = engine.core._scheduler.turns
    assert len(turns) > 0
    waiting = [request.id for request in turns._waiting]
    engine.core.abort(waiting[0])
    assert waiting[0] not in [request.id for request in turns._waiting]
    engine.run()
    assert len(turns) == 0
    assert engine.outcome(1) == "length"
    engine.core.check()


@pytest.mark.fault("sampling-holds-step")
def test_prompt_log_probabilities_of_a_step_are_bounded_over_all_requests() -> None:
    engine = Engine(OracleRunner(num_blocks=400), token_budget=200, prompt_logprob_rows=20)
    for id in range(1, 7):
        engine.submit(id, [id] * 50, 2, prompt_logprobs=1)
    most = 0
    while not engine.core.idle:
        engine.step()
        most = max(most, len(engine.runner.batches[-1].logit_rows))
    assert most <= 20 + 6
    for id in range(1, 7):
        assert len(engine.outputs[id][0].prompt_logprobs) == 49
        assert engine.tokens(id) == continuation([id] * 50, [], 2)


def test_requests_that_are_preempted_while_they_wait_for_their_turn_get_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = {id: SamplingParams(temperature=50.0, top_p=0.99, seed=id) for id in range(2, 8)}
    alone = Engine(OracleRunner(num_blocks=40))
    engine = with_costs(monkeypatch, rows=8, num_blocks=14)
    for id, params in sampling.items():
        alone.submit(id, [id], 12, sampling=params)
        alone.run()
        engine.submit(id, [id], 12, sampling=params)
    engine.submit(1, [1], 40, priority=5)
    preempted_while_waiting = 0
    turns = engine.core._scheduler.turns
    drop = turns.drop

    def counting(request: Request) -> None:
        nonlocal preempted_while_waiting
        preempted_while_waiting += request in turns._waiting
        drop(request)

    monkeypatch.setattr(turns, "drop", counting)
    engine.run()
    assert preempted_while_waiting > 0
    assert engine.tokens(1) == continuation([1], [], 40)
    for id in sampling:
        assert engine.tokens(id) == alone.tokens(id)
