"""The kernels' sampler: the tokens of the numpy form, whatever logits and parameters are."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from loraplex_model.decoder.sampling import NativeSampling
from loraplex_model.ops.build import Kernels, cpu_flags
from loraplex_server.engine.batching.sampler import NON_FINITE, Draw, logprobs, sample
from loraplex_server.engine.messages import SamplingParams

# numpy rounds exponentials as the kernels do on every x86 processor with FMA. Elsewhere weights
# differ in their last bit, which changes the token if the random number lies that close to a
# boundary.
SAME_EXPONENTIALS = "fma" in cpu_flags()
VOCABS = (1, 2, 15, 16, 17, 63, 300, 3000, 8192, 9001)
SCALES = (0.0, 0.01, 1.0, 3.0, 8.0, 40.0, 1e6)


@pytest.fixture
def native(library: Kernels) -> NativeSampling:
    return NativeSampling(library, 2)


def some_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Rows of all kinds: smooth and with ties, flat and peaked, huge and not finite."""
    values = rng.standard_normal((rows, vocab)) * rng.choice(SCALES, (rows, 1))
    values[::3] = np.round(values[::3])
    values[rng.random(rows) < 0.1] += 12.0 * (np.arange(vocab) == vocab // 2)
    logits = values.astype(np.float32)
    with np.errstate(over="ignore"):
        logits[rng.random(rows) < 0.03] *= np.float32(1e32)
    logits[rng.random(rows) < 0.02, vocab // 3] = np.nan
    logits[rng.random(rows) < 0.02, vocab - 1] = np.inf
    logits[rng.random(rows) < 0.02] = -np.inf
    return logits


def some_draw(rng: np.random.Generator, vocab: int) -> Draw:
    """Any parameters, the extreme ones often, after some tokens."""

    def often(usual: float, *others: float) -> float:
        return usual if rng.random() < 0.5 else float(rng.choice(others))

    ids = rng.integers(0, vocab, 3).tolist()
    draw = Draw(
        SamplingParams(
            temperature=often(0.7, 0.0, 1e-45, 1e-30, 1e-7, 0.01, 1.0, 1.3, 5.0, 100.0, 1e7),
            top_p=often(1.0, 0.0, 1e-6, 0.3, 0.5, 0.95, 0.999, 0.9999999),
            top_k=int(often(0, 1, 2, 40, vocab // 2, vocab - 1, vocab, 1 << 40)),
            min_p=often(0.0, 1e-40, 0.02, 0.5, 1.0),
            repetition_penalty=often(1.0, 1.5, 0.5, 100.0, 1e-45),
            presence_penalty=often(0.0, 1.5, -2.0),
            frequency_penalty=often(0.0, 0.3, -2.0),
            logit_bias=dict(zip(ids, (5.0, -100.0, 0.1), strict=True)) if often(0, 1) else {},
            seed=int(rng.integers(0, 1 << 63)),
        ),
        rng.integers(0, vocab, 20).tolist(),
    )
    for token in rng.integers(0, vocab, rng.integers(0, 90)).tolist():
        draw.saw(token)
    return draw


def chosen(native: NativeSampling, logits: np.ndarray, draws: list[Draw]) -> list[int]:
    lines = np.arange(len(logits), dtype=np.int32)
    return native.choose(logits, lines, [draw.address for draw in draws]).tolist()


@pytest.mark.parametrize("vocab", VOCABS)
def test_every_row_gets_the_token_of_the_numpy_form(native: NativeSampling, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows = 600 if vocab < 3000 else 250
    logits = some_logits(rng, rows, vocab)
    draws = [some_draw(rng, vocab) for _ in range(rows)]
    expected = np.array(sample(logits, draws))
    differ = np.flatnonzero(np.array(chosen(native, logits, draws)) != expected)
    assert len(differ) <= (0 if SAME_EXPONENTIALS else rows // 100), [
        draws[row].params for row in differ
    ]
    assert NON_FINITE in expected
    assert vocab == 1 or len(set(expected)) > 2


def some_mask(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Few allowed tokens, or nearly all, or whole words of one kind; at least one."""
    allowed = rng.random(vocab) < rng.choice([0.0, 0.001, 0.5, 0.999])
    if rng.random() < 0.3:
        allowed = np.repeat(rng.random(-(-vocab // 32)) < 0.5, 32)[:vocab]
    allowed[rng.integers(0, vocab)] = True
    bits = np.packbits(np.pad(allowed, (0, -vocab % 32)), bitorder="little")
    return bits.view(np.uint32)


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_masked_row_gets_an_allowed_token_that_of_the_numpy_form(
    native: NativeSampling, vocab: int
) -> None:
    rng = np.random.default_rng(1000 + vocab)
    rows = 600 if vocab < 3000 else 250
    logits = some_logits(rng, rows, vocab)
    draws = [some_draw(rng, vocab) for _ in range(rows)]
    masks = [some_mask(rng, vocab) if rng.random() < 0.8 else None for _ in draws]
    for draw, mask in zip(draws, masks, strict=True):
        if mask is not None:
            draw.allow(mask)
    expected = sample(logits, draws)
    actual = chosen(native, logits, draws)
    differ = np.flatnonzero(np.array(actual) != expected)
    assert len(differ) <= (0 if SAME_EXPONENTIALS else rows // 100)
    for token, mask in zip(expected, masks, strict=True):
        if mask is not None and token != NON_FINITE:
            assert mask[token >> 5] >> (token & 31) & 1


def test_a_mask_removes_tokens_before_top_k_and_top_p(native: NativeSampling) -> None:
    """The choice is that of a model that gives the other tokens no probability."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        logits = rng.standard_normal((1, 300)).astype(np.float32) * 3
        mask = some_mask(rng, 300)
        allowed = np.unpackbits(mask.view(np.uint8), count=300, bitorder="little").astype(bool)
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 0.8, 2.0])),
            top_k=int(rng.choice([0, 1, 5, 100])),
            top_p=float(rng.choice([1.0, 0.9, 0.5])),
            min_p=float(rng.choice([0.0, 0.1])),
            repetition_penalty=float(rng.choice([1.0, 1e-30, 1.5])),
            logit_bias={3: 50.0},
            seed=int(rng.integers(1 << 32)),
        )
        masked, removed = (Draw(params, [3, 4, 5]) for _ in range(2))
        masked.allow(mask)
        without = removed._adjust(logits[0].copy())
        without[~allowed] = -1e20
        plain = Draw(msgspec.structs.replace(params, logit_bias={}, repetition_penalty=1.0), [])
        assert chosen(native, logits, [masked]) == sample(without[np.newaxis], [plain])


def test_a_row_depends_neither_on_other_rows_nor_on_threads(library: Kernels) -> None:
    rng = np.random.default_rng(5)
    logits = some_logits(rng, 60, 3000)
    draws = [some_draw(rng, 3000) for _ in range(60)]
    alone = [
        chosen(NativeSampling(library, 1), logits[i : i + 1], [draws[i]])[0] for i in range(60)
    ]
    order = rng.permutation(60).astype(np.int32)
    addresses = [draws[row].address for row in order]
    for threads in (1, 3):
        tokens = NativeSampling(library, threads).choose(logits, order, addresses)
        assert tokens.tolist() == [alone[row] for row in order]


def test_of_equal_logits_top_p_keeps_the_first_and_top_k_keeps_all(native: NativeSampling) -> None:
    flat = np.zeros((400, 200), np.float32)
    half = [Draw(SamplingParams(top_p=0.5, seed=seed), []) for seed in range(400)]
    assert set(chosen(native, flat, half)) <= set(range(100))
    three = [Draw(SamplingParams(top_k=3, seed=seed), []) for seed in range(400)]
    assert max(chosen(native, flat, three)) > 150


def test_tokens_of_a_request_change_with_what_it_has_seen(native: NativeSampling) -> None:
    rng = np.random.default_rng(3)
    draw = Draw(SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.2), [7])
    line = (rng.standard_normal((1, 500)) * 2).astype(np.float32)
    tokens = []
    for _ in range(300):  # so many that the arrays of tokens grow several times
        tokens += chosen(native, line, [draw])
        assert tokens[-1] == draw.choose(line[0])
        draw.saw(tokens[-1])
    assert len(set(tokens)) > 100


@pytest.mark.parametrize("vocab", VOCABS)
def test_log_probabilities_are_those_of_the_numpy_form(native: NativeSampling, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = some_logits(rng, 60, vocab)
    logits = logits[np.isfinite(logits).all(axis=1)]
    rows = len(logits)
    tokens = rng.integers(0, vocab, rows).astype(np.int32)
    counts = rng.integers(0, min(vocab, 20) + 1, rows).astype(np.int32)
    own, ids, values = native.score(logits, np.arange(rows, dtype=np.int32), tokens, counts)
    for row in range(rows):
        theirs = logprobs(logits[row], int(tokens[row]), int(counts[row]))
        count = counts[row]
        assert ids[row, :count].tolist() == [token for token, _ in theirs.top]
        expected = np.array([theirs.logprob, *(value for _, value in theirs.top)])
        actual = np.array([own[row], *values[row, :count]])
        # A last bit of exponentials changes the logarithm of their sum by at most that much.
        slack = 0.0 if SAME_EXPONENTIALS else 2e-6 * np.maximum(1.0, np.abs(expected))
        assert (np.abs(actual - expected) <= slack).all()


def test_lines_that_are_not_finite_are_found(native: NativeSampling) -> None:
    logits = some_logits(np.random.default_rng(1), 300, 77)
    logits[5] = np.float32(3.4e38)
    assert native.finite(logits) == np.isfinite(logits).all(axis=1).tolist()
    assert native.finite(logits[:0]) == []
