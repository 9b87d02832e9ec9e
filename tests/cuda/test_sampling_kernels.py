"""Tokens chosen by the kernels against those that the server's sampler chooses on the CPU."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from loraplex_model.decoder.cuda.draws import RECORD, DrawTable
from loraplex_model.decoder.cuda.kernels.sampling import (
    DeviceDraws,
    copy_lines,
    sample,
    workspace,
)
from loraplex_server.engine.batching.sampler import NON_FINITE, Draw, uniform
from loraplex_server.engine.messages import SamplingParams
from loraplex_server.engine.runner.protocol import NOTHING_PENDING, DrawOrder

PROMPT, OUTPUT = (1, 4, 4, 9), (7, 9, 9, 9, 2)
NEAR = 1e-6
UNTOUCHED = -77

SMALL = {"tile": 16, "block": 128}
"""Sizes with which a few hundred values need several passes, blocks and gathered parts."""


def order_of(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    pending: int = NOTHING_PENDING,
) -> DrawOrder:
    """What the engine asks for after `output`, and one more token if one is pending."""
    repeats = params.repetition_penalty != 1.0
    counts = Counter(output) if params.presence_penalty or params.frequency_penalty else Counter()
    position = len(output) + (pending != NOTHING_PENDING)
    return DrawOrder(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        uniform=uniform(params.seed, position),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seen=np.array(sorted({*prompt, *output} if repeats else ()), np.int32),
        counted=np.array(list(counts), np.int32),
        counts=np.array(list(counts.values()), np.float32),
        pending=pending,
    )


def draw_of(params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Draw:
    """The CPU's state after `output`."""
    draw = Draw(params, prompt)
    for token in output:
        draw.saw(token)
    return draw


def choose(
    logits: np.ndarray,
    orders: Sequence[DrawOrder],
    rows: Sequence[int] | None = None,
    *,
    last: Sequence[int] = (),
    padding: int = 0,
    tile: int = 4096,
    block: int = 4096,
) -> list[int]:
    """Tokens from a copy of `logits`; everything that no kernel may read holds nonsense."""
    table = DrawTable.of(orders, np.arange(len(orders), dtype=np.int32) if rows is None else rows)
    records = np.full((len(orders) + padding, RECORD), 0x7FABCDEF, np.int32)
    records[: len(orders)] = table.records
    draws = DeviceDraws(
        torch.from_numpy(records),
        torch.from_numpy(table.lists),
        torch.tensor([len(orders)], dtype=torch.int32),
    )
    kept = workspace(len(records), torch.device("cpu"))[:, :tile].contiguous().fill_(0x7FC00000)
    tokens = torch.full((max(len(records), len(last)),), UNTOUCHED, dtype=torch.int32)
    tokens[: len(last)] = torch.tensor(last, dtype=torch.int32)
    sample(torch.from_numpy(logits.copy()), draws, tokens, kept, block=block)
    assert (tokens[max(len(orders), len(last)) :] == UNTOUCHED).all()
    return tokens[: len(orders)].tolist()


def exact(logits: np.ndarray, draw: Draw, u: float, top_p: float, min_p: float) -> int:
    """The token by sorting, in float64, with the draw's other parameters."""
    adjusted = draw._adjust(logits)
    scaled = (adjusted - adjusted.max()) / np.float32(draw.params.temperature)
    weights = np.exp(scaled.astype(np.float64))
    if 0 < draw.params.top_k < len(logits):
        weights[scaled < np.sort(scaled)[-draw.params.top_k]] = 0
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    if draw.params.top_p < 1.0:
        weights[order[1:][before[1:] >= top_p * weights.sum()]] = 0
    weights[weights < min_p] = 0
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends, u * ends[-1], side="right"))


def is_near_boundary(logits: np.ndarray, draw: Draw, token: int) -> bool:
    """Whether `token` is drawn if the random number or a threshold is changed by `NEAR`."""
    u, params = uniform(draw.params.seed, draw._index), draw.params
    return any(
        exact(logits, draw, u + du * NEAR, params.top_p + dp * NEAR, params.min_p * (1 + dm * NEAR))
        == token
        for du, dp, dm in itertools.product((-1, 0, 1), repeat=3)
    )


def agree(logits: np.ndarray, draws: Sequence[Draw], tokens: Sequence[int]) -> int:
    """Checks all tokens against the CPU's; returns the number that differ, near a boundary."""
    differ = 0
    for row, draw, token in zip(logits, draws, tokens, strict=True):
        expected = draw.choose(row)
        if token != expected:
            differ += 1
            assert is_near_boundary(row, draw, token), (draw.params, expected, token)
    return differ


def normal(seed: int, rows: int, vocab: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 4).astype(np.float32)


PENALTIES = [
    {},
    {"repetition_penalty": 1.4, "presence_penalty": 0.75, "frequency_penalty": -0.3},
]
GRID = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=2**63 + 11 * i, **penalties)
    for i, (t, k, p, m, penalties) in enumerate(
        itertools.product(
            [0.0, 1e-30, 0.3, 1.0, 60.0],
            [0, 1, 40],
            [1.0, 1 - 1e-7, 0.9, 0.3, 1e-9],
            [0.0, 0.02, 1.0],
            PENALTIES,
        )
    )
]


@pytest.mark.parametrize(("share", "sizes"), [(3, {}), (9, SMALL)], ids=["usual", "small"])
def test_combinations_of_parameters_draw_the_token_of_the_cpu(
    share: int, sizes: dict[str, int]
) -> None:
    """A part of all combinations, chosen by chance but the same in every run."""
    params = [GRID[i] for i in np.random.default_rng(share).permutation(len(GRID))[::share]]
    logits = normal(1, len(params), 300)
    tokens = choose(logits, [order_of(p, PROMPT, OUTPUT) for p in params], **sizes)
    assert agree(logits, [draw_of(p, PROMPT, OUTPUT) for p in params], tokens) == 0
    assert len(set(tokens)) > 15


def any_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.2, 1.0, 3.0])),
        top_k=int(rng.choice([0, rng.integers(1, 3000)])),
        top_p=float(rng.choice([1.0, rng.uniform(0.01, 1)])),
        min_p=float(rng.choice([0.0, rng.uniform(0, 0.2)])),
        repetition_penalty=float(rng.choice([1.0, 0.5, 1.8])),
        presence_penalty=float(rng.uniform(-1, 1)),
        seed=int(rng.integers(2**63)),
    )


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 7, 127, 128, 129, 1001, 4097, 5000])
def test_any_size_of_vocabulary(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    params = [any_params(rng) for _ in range(6)]
    logits = normal(vocab, len(params), vocab)
    # Ids past the vocabulary never come; here they show that the lists are bounded.
    ids = (*range(min(vocab, 40)), vocab, 2**31 - 1)
    orders = [order_of(p, ids, ids) for p in params]
    draws = [draw_of(p, ids[:-2], ids[:-2]) for p in params]
    for order, draw in zip(orders, draws, strict=True):
        object.__setattr__(order, "uniform", uniform(draw.params.seed, draw._index))
    sizes = {"tile": 256, "block": 512} if vocab > 4000 else {}
    assert agree(logits, draws, choose(logits, orders, **sizes)) == 0


@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["usual", "small"])
@pytest.mark.parametrize("levels", [1, 2, 9])
def test_equal_logits_at_the_thresholds(levels: int, sizes: dict[str, int]) -> None:
    """At the k-th place all remain; at the edge of top-p the first by id."""
    rng = np.random.default_rng(levels)
    params = [
        SamplingParams(top_k=k, top_p=p, min_p=m, seed=seed)
        for k, p, m in [(30, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.83, 0.1), (70, 0.6, 0.0), (5, 0.1, 0)]
        for seed in range(1 if sizes else 3)
    ]
    params += [SamplingParams(temperature=0.0)] * 2
    logits = (rng.integers(0, levels, (len(params), 333)) / 4).astype(np.float32)
    tokens = choose(logits, [order_of(p) for p in params], **sizes)
    assert agree(logits, [Draw(p, ()) for p in params], tokens) == 0


def test_rows_that_are_not_finite_fail_alone() -> None:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=1.0),
        SamplingParams(top_p=0.9, presence_penalty=0.5, repetition_penalty=0.5),
        SamplingParams(top_k=7),
    ]
    places = (0, 4, 299)  # 4 has penalties
    values = (np.nan, -np.nan, np.inf, -np.inf)
    bad = [(i, place) for i, place in enumerate(places * len(values))]
    logits = normal(5, len(bad) + 1, 300)
    for row, place in bad:
        logits[row, place] = values[row % len(values)]
    for params in kinds:
        output = (*OUTPUT, 4)
        tokens = choose(logits, [order_of(params, PROMPT, output)] * len(logits))
        assert tokens[:-1] == [NON_FINITE] * len(bad)
        assert tokens[-1] == draw_of(params, PROMPT, output).choose(logits[-1])
    pending = order_of(kinds[1], PROMPT, OUTPUT, pending=0)
    assert choose(logits[1:2], [pending], last=[4]) == [NON_FINITE]


def test_huge_finite_logits_are_finite() -> None:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=3),
        SamplingParams(top_p=0.9, top_k=9, seed=4),
        SamplingParams(repetition_penalty=1e-30, seed=5),
        SamplingParams(temperature=0.0, presence_penalty=1.0),
        SamplingParams(temperature=1e30, repetition_penalty=90.0, seed=5),
    ]
    logits = np.full((3, len(kinds), 64), 3e38, np.float32)
    logits[1, :, ::2] = -3e38
    logits[2, :, 1:] = 1e31
    for part in logits:
        tokens = choose(part, [order_of(p, PROMPT, OUTPUT) for p in kinds])
        with np.errstate(over="ignore"):
            assert agree(part, [draw_of(p, PROMPT, OUTPUT) for p in kinds], tokens) == 0


@pytest.mark.parametrize("token", [1, 7, 30, NON_FINITE])
def test_a_pending_token_counts_as_if_it_were_known(token: int) -> None:
    """It may be in both lists already, in that of the prompt only, or in none."""
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=3.0),
        SamplingParams(temperature=0.0, frequency_penalty=2.0),
        SamplingParams(temperature=0.0, presence_penalty=2.0),
        SamplingParams(temperature=0.5, seed=8, repetition_penalty=0.3, frequency_penalty=-1.0),
        SamplingParams(temperature=0.8, seed=9, repetition_penalty=1.3, presence_penalty=1.0),
        SamplingParams(temperature=0.8, seed=9),
    ]
    logits = normal(6, len(params), 40) / 4
    logits[:, [1, 7, 30]] += 3
    draws = [draw_of(p, PROMPT, OUTPUT) for p in params]
    for draw in draws:
        if token == NON_FINITE:
            draw._index += 1  # this request is going to fail: the pass must not
        else:
            draw.saw(token)
    # One row where the pending token decides, and any other choice is that without it.
    params.append(SamplingParams(temperature=0.0, frequency_penalty=-2.0))
    decided = np.zeros((1, 40), np.float32)
    decided[0, [1, 30, 7]] = (5, 5, 3)
    orders = [order_of(p, PROMPT, OUTPUT, pending=2) for p in params]
    *tokens, last = choose(
        np.concatenate([logits, decided]), orders, last=[UNTOUCHED, 5, token, UNTOUCHED]
    )
    assert agree(logits, draws, tokens) == 0
    assert last == (9 if token == NON_FINITE else token)


def test_pending_tokens_are_read_before_any_is_overwritten() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=9.0)
    logits = np.zeros((3, 8), np.float32)
    logits[:, [2, 5, 6]] = (3, 2, 1)
    orders = [order_of(params, (), (), pending=k) for k in (2, 0, 1)]
    assert choose(logits, orders, last=[5, 2, 2]) == [5, 2, 5]


def test_long_lists_of_seen_tokens() -> None:
    vocab = 3000
    prompt = np.random.default_rng(0).permutation(vocab)[:2500].tolist()
    params = [
        SamplingParams(seed=i, repetition_penalty=1.7, frequency_penalty=0.1) for i in range(3)
    ]
    output = prompt[:1300] * 2
    logits = normal(8, len(params), vocab)
    tokens = choose(logits, [order_of(p, prompt, output) for p in params])
    assert agree(logits, [draw_of(p, prompt, output) for p in params], tokens) == 0


def test_a_row_does_not_depend_on_the_others_and_padding_is_left_alone() -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.8, seed=4),
        SamplingParams(top_k=50, top_p=0.9, repetition_penalty=1.2, seed=5),
        SamplingParams(min_p=0.1, frequency_penalty=1.0, seed=6),
    ]
    orders = [order_of(p, PROMPT, OUTPUT) for p in params]
    logits = normal(9, 6, 500)
    rows = np.array([5, 0, 3, 2], np.int32)
    together = choose(logits, orders, rows, padding=3, **SMALL)
    for order, row, token in zip(orders, rows, together, strict=True):
        assert choose(logits[row : row + 1], [order], **SMALL) == [token]
    assert choose(logits, [], padding=2) == []


def test_only_rows_that_a_draw_chooses_from_are_changed() -> None:
    logits = torch.from_numpy(normal(10, 3, 200))
    before = logits.clone()
    table = DrawTable.of([order_of(SamplingParams(top_p=0.5))], np.array([1], np.int32))
    draws = DeviceDraws(
        torch.from_numpy(table.records), torch.from_numpy(table.lists), torch.tensor([1]).int()
    )
    tokens = torch.zeros(1, dtype=torch.int32)
    sample(logits, draws, tokens, workspace(1, torch.device("cpu")))
    assert torch.equal(logits[::2], before[::2])


def test_lines_are_copied_as_they_are() -> None:
    logits = torch.from_numpy(normal(11, 5, 4100))
    logits[3, 7] = float("nan")
    lines = torch.full((4, 4100), -5.0)
    rows = torch.tensor([3, 0, 3, 2**30], dtype=torch.int32)
    copy_lines(logits, rows, torch.tensor([3], dtype=torch.int32), lines)
    np.testing.assert_array_equal(lines[:3], logits[[3, 0, 3]])
    assert (lines[3] == -5).all()
