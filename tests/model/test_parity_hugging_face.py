"""Logits equal those of `AutoModelForCausalLM` on the same NF4 weights, float32, within 1e-4."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from model.conftest import Load
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids

from model import tiny

LENGTHS = (37, 5, 20)


@pytest.fixture(params=tiny.VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def driver(variant: str, decoder_class, load_tiny: Load) -> Driver:
    return Driver(decoder_class(load_tiny(variant).weights, NUM_BLOCKS, BLOCK_SIZE, 1))


@pytest.fixture
def sequences() -> list[Sequence]:
    return [Sequence(token_ids(i, n, tiny.VOCAB)) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def oracle() -> Callable[[str], list[torch.Tensor]]:
    """Hugging Face's logits of the three sequences, by variant."""

    @functools.cache
    def logits(variant: str) -> list[torch.Tensor]:
        model = tiny.oracle(variant)
        with torch.no_grad():
            return [
                model(torch.tensor([token_ids(i, n, tiny.VOCAB)])).logits[0]
                for i, n in enumerate(LENGTHS)
            ]

    return logits


@pytest.fixture
def check(variant: str, oracle, sequences: list[Sequence]) -> Callable[[], None]:
    def compare() -> None:
        for sequence, expected in zip(sequences, oracle(variant), strict=True):
            found = torch.cat(sequence.logits)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)

    return compare


def test_the_oracle_tells_tokens_and_positions_apart(variant: str) -> None:
    model = tiny.oracle(variant)
    ids = token_ids(0, 12, tiny.VOCAB)
    swapped = [ids[1], ids[0], *ids[2:]]
    with torch.no_grad():
        one, other = (model(torch.tensor([tokens])).logits[0] for tokens in (ids, swapped))
    assert (one[2] - other[2]).abs().max() > 1e-2


def test_whole_prompts_in_one_pass(check, driver: Driver, sequences) -> None:
    driver.step(*((sequence, len(sequence.ids)) for sequence in sequences))
    check()


def test_token_by_token(check, driver: Driver, sequences) -> None:
    while waiting := [s for s in sequences if s.done < len(s.ids)]:
        driver.step(*((sequence, 1) for sequence in waiting))
    check()


def test_prompts_in_chunks_among_decode_rows(check, driver: Driver, sequences) -> None:
    long, short, middle = sequences
    driver.step((short, 4), (long, 9))
    driver.step((middle, 17), (short, 1), (long, 6))
    driver.step((long, 21), (middle, 1))
    driver.step((middle, 1), (long, 1))
    driver.step((middle, 1))
    check()


def test_preempted_and_resumed(check, driver: Driver, sequences) -> None:
    long, short, middle = sequences
    driver.step((long, 30), (middle, 10))
    driver.step((long, 1), (middle, 1))
    before = list(long.blocks)
    driver.preempt(long)
    driver.step((middle, 1), (short, 5))
    driver.step((long, 32), (middle, 1))
    assert not set(before) & set(long.blocks)
    driver.step((long, 5), (middle, 7))
    check()
