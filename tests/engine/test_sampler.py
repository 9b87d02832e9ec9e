"""Sampling against Hugging Face's processors and against naive arithmetic in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.batching.sampler import (
    NON_FINITE,
    Draw,
    candidates,
    invert,
    logprobs,
    sample,
    uniform,
)
from loraplex_server.engine.messages import SamplingParams

VOCAB = 1000


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 4).astype(np.float32)


def distribution(draw: Draw, logits: np.ndarray) -> np.ndarray:
    """The probabilities that `draw` samples from, as `choose` computes them; float64 [vocab]."""
    adjusted = draw._adjust(logits)
    scaled = (adjusted - adjusted.max()) / np.float32(draw.params.temperature)
    ids, weights = candidates(scaled, draw.params.top_k, draw.params.top_p, draw.params.min_p)
    whole = np.zeros(len(logits))
    whole[slice(None) if ids is None else ids] = weights
    return whole / whole.sum()


@pytest.fixture(scope="module")
def warp():
    """Hugging Face's own pipeline: `warp(logits, prompt, params)` gives probabilities."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    def run(logits: np.ndarray, ids: list[int], p: SamplingParams) -> np.ndarray:
        steps = []
        if p.logit_bias:
            steps.append(
                hf.SequenceBiasLogitsProcessor({(k,): float(v) for k, v in p.logit_bias.items()})
            )
        if p.repetition_penalty != 1.0:
            steps.append(hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
        steps.append(hf.TemperatureLogitsWarper(p.temperature))
        if p.top_k:
            steps.append(hf.TopKLogitsWarper(p.top_k))
        if p.top_p < 1.0:
            steps.append(hf.TopPLogitsWarper(p.top_p))
        if p.min_p > 0.0:
            steps.append(hf.MinPLogitsWarper(p.min_p))
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        seen = torch.tensor([ids])
        for step in steps:
            scores = step(seen, scores)
        return torch.softmax(scores, -1)[0].numpy()

    return run


GRID = [
    SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        [0.3, 1.0, 2.5], [0, 1, 40], [1.0, 0.9, 0.3], [0.0, 0.02], [1.0, 1.3]
    )
]


@pytest.mark.parametrize("seed", range(3))
def test_the_distribution_is_that_of_hugging_face(warp, seed: int) -> None:
    logits = random_logits(seed)[0]
    prompt = [int(i) for i in np.argsort(-logits)[:50:3]]
    for params in GRID:
        ours = distribution(Draw(params, prompt), logits)
        theirs = warp(logits, prompt, params)
        assert (ours > 0).tolist() == (theirs > 0).tolist(), params
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-9, err_msg=str(params))


def test_a_bias_counts_before_the_penalty_as_in_hugging_face(warp) -> None:
    logits = random_logits(5)[0]
    params = SamplingParams(logit_bias={3: 5.0, 7: -100.0}, repetition_penalty=1.5)
    ours = distribution(Draw(params, [3, 4, 7]), logits)
    np.testing.assert_allclose(ours, warp(logits, [3, 4, 7], params), rtol=2e-5, atol=1e-12)


def test_presence_and_frequency_count_the_output_and_not_the_prompt() -> None:
    logits = random_logits(6)[0]
    params = SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    draw = Draw(params, prompt=[1, 1, 2])
    np.testing.assert_array_equal(draw._adjust(logits), logits)
    for token in (5, 5, 5, 9):
        draw.saw(token)
    expected = logits.astype(np.float64)
    expected[5] -= 0.5 + 3 * 0.25
    expected[9] -= 0.5 + 0.25
    np.testing.assert_allclose(draw._adjust(logits), expected, rtol=1e-6)


def test_repetition_counts_prompt_and_output() -> None:
    logits = np.array([2.0, -2.0, 2.0, -2.0], np.float32)
    draw = Draw(SamplingParams(repetition_penalty=2.0), prompt=[0, 0, 1])
    np.testing.assert_array_equal(draw._adjust(logits), [1.0, -4.0, 2.0, -2.0])
    draw.saw(3)
    np.testing.assert_array_equal(draw._adjust(logits), [1.0, -4.0, 2.0, -4.0])


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits = np.array([[1, 7, 7, 0], [9, 7, 7, 0]], np.float32)
    plain = SamplingParams(temperature=0.0)
    assert sample(logits, [Draw(plain, []), Draw(plain, [])]) == [1, 0]
    biased = SamplingParams(temperature=0.0, logit_bias={3: 20.0})
    assert sample(logits, [Draw(plain, []), Draw(biased, [])]) == [1, 3]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = random_logits(8, vocab=12)[0]
    params = SamplingParams(temperature=1.3, top_p=0.95)
    expected = distribution(Draw(params, []), logits)
    counts = np.zeros(12)
    trials = 5_000
    for seed in range(trials):
        counts[Draw(SamplingParams(temperature=1.3, top_p=0.95, seed=seed), []).choose(logits)] += 1
    assert not counts[expected == 0].any()
    live = expected > 0
    chi2 = ((counts - trials * expected)[live] ** 2 / (trials * expected[live])).sum()
    assert chi2 < 40, f"chi-square {chi2} over {live.sum() - 1} degrees of freedom"


def test_one_seed_gives_independent_uniform_numbers() -> None:
    numbers = np.array([uniform(seed, index) for seed in range(100) for index in range(100)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 60
    grid = numbers.reshape(100, 100)
    for neighbours in (grid[:, 1:] * grid[:, :-1], grid[1:] * grid[:-1]):
        assert abs(neighbours.mean() - 0.25) < 0.01
    assert len(set(numbers)) == len(numbers)
    step = 0x9E3779B97F4A7C15  # what SplitMix64 adds: seeds this far apart must not run in step
    assert uniform(1, 1) != uniform(1 + step, 0)


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=700).filter(any),
    u=st.floats(0, 1, exclude_max=True),
)
def test_the_draw_inverts_the_running_sum(weights: list[float], u: float) -> None:
    array = np.array(weights, np.float32)
    at = invert(array, u)
    ends = np.cumsum(array, dtype=np.float64)
    assert array[at] > 0
    slack = 1e-9 * ends[-1]
    assert ends[at] - array[at] - slack <= u * ends[-1] <= ends[at] + slack


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    logits = random_logits(9, rows=9, vocab=4099)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=4),
        SamplingParams(temperature=0.7, top_k=20, seed=4),
        SamplingParams(top_p=0.8, repetition_penalty=1.2, seed=9),
        SamplingParams(min_p=0.1, seed=2**64 - 1),
    ]
    for row, params in itertools.product(range(9), kinds):
        prompt = [1, 2, 3]
        alone = sample(logits[row : row + 1].copy(), [Draw(params, prompt)])
        mates = [Draw(kinds[i % len(kinds)], prompt) for i in range(9)]
        mates[row] = Draw(params, prompt)
        assert sample(logits, mates)[row] == alone[0]


def test_the_draw_depends_on_seed_and_position_only() -> None:
    logits = random_logits(10, rows=30)

    def tokens(seed: int) -> list[int]:
        draw = Draw(SamplingParams(seed=seed), [])
        out = []
        for row in logits:
            out.append(draw.choose(row))
            assert draw.choose(row) == out[-1]
            draw.saw(out[-1])
        return out

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    flat = np.zeros((30, VOCAB), np.float32)
    draw, repeated = Draw(SamplingParams(), []), set()
    for row in flat:
        repeated.add(draw.choose(row))
        draw.saw(0)
    assert len(repeated) > 20


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = random_logits(11, rows=5)
    clean = sample(logits, [Draw(SamplingParams(seed=i), []) for i in range(5)])
    logits[2, 77] = bad
    tokens = sample(logits, [Draw(SamplingParams(seed=i), []) for i in range(5)])
    assert tokens == [*clean[:2], NON_FINITE, *clean[3:]]
    greedy = sample(logits, [Draw(SamplingParams(temperature=0.0), [])] * 5)
    assert [token == NON_FINITE for token in greedy] == [False, False, True, False, False]


def test_huge_finite_logits_are_finite() -> None:
    logits = np.full((1, 64), 3e38, np.float32)
    assert sample(logits, [Draw(SamplingParams(temperature=0.0), [])]) == [0]


@settings(deadline=None)
@given(
    params=st.builds(
        SamplingParams,
        temperature=st.floats(0, 100),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=st.integers(0, 2**31),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0, 100, exclude_min=True),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, 15), st.floats(-100, 100), max_size=3),
        seed=st.integers(0, 2**64 - 1),
    ),
    logits=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=16, max_size=16),
    output=st.lists(st.integers(0, 15), max_size=5),
)
def test_every_valid_parameter_gives_a_token(
    params: SamplingParams, logits: list[float], output: list[int]
) -> None:
    draw = Draw(params, prompt=[0, 3])
    for token in output:
        draw.saw(token)
    assert 0 <= draw.choose(np.array(logits, np.float32)) < 16


def test_logprobs_are_of_the_raw_distribution_and_sorted() -> None:
    logits = random_logits(12)[0]
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum())
    entry = logprobs(logits, 17, 20)
    assert entry.token_id == 17
    assert entry.logprob == pytest.approx(exact[17], abs=2e-6)
    order = np.argsort(-exact, kind="stable")[:20]
    assert [token for token, _ in entry.top] == order.tolist()
    np.testing.assert_allclose([p for _, p in entry.top], exact[order], atol=2e-6)
    assert logprobs(logits, 17, 0).top == []
    assert len(logprobs(logits[:5], 1, 20).top) == 5


def test_logprobs_equal_torch_log_softmax_over_a_large_vocabulary() -> None:
    torch = pytest.importorskip("torch")
    logits = random_logits(13, vocab=49152)[0]
    theirs = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    for token in (0, 5, 49151):
        assert logprobs(logits, token, 0).logprob == pytest.approx(float(theirs[token]), abs=2e-6)
