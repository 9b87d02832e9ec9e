"""The loss in chunks is torch's, and so are its derivatives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from loraplex_model.adapters.delta import AdapterDelta, RowsDelta
from loraplex_model.base.config import MODEL
from loraplex_training.step import loss
from torch.nn.functional import cross_entropy

VOCAB, HIDDEN, ROWS = 37, 8, 53
CHANCE = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=CHANCE, dtype=torch.float64)


def base_of(head: torch.Tensor, scale: float = 1.0, cap: float = 0.0) -> Any:
    """As much of a base as a loss needs."""
    config = SimpleNamespace(logit_scale=scale, logit_softcap=cap)
    return SimpleNamespace(lm_head=head, config=config)


@pytest.fixture
def base() -> Any:
    return base_of(normal(VOCAB, HIDDEN))


@pytest.fixture(autouse=True)
def _small_chunks() -> Any:
    """So that the rows take several, the last one short."""
    with mock.patch.object(loss, "_MOST_ROWS", 16):
        yield


TARGETS = torch.randint(VOCAB, (ROWS,), generator=CHANCE)


def test_losses_and_gradients_of_rows(base: Any) -> None:
    hidden = normal(ROWS, HIDDEN).requires_grad_()
    weights = normal(ROWS)  # each row counts differently
    found = loss.token_losses(base, hidden, TARGETS)
    wanted = cross_entropy(hidden @ base.lm_head.T, TARGETS, reduction="none")
    torch.testing.assert_close(found, wanted)
    (mine,) = torch.autograd.grad((found * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((wanted * weights).sum(), hidden)
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(loss.token_losses(base, hidden, TARGETS), wanted)


@pytest.mark.parametrize(("scale", "cap"), [(0.25, 0.0), (1.0, 1.5), (3.0, 2.0)])
def test_scaled_and_capped_logits(scale: float, cap: float) -> None:
    base = base_of(normal(VOCAB, HIDDEN), scale, cap)
    hidden = normal(ROWS, HIDDEN).requires_grad_()
    scores = hidden @ base.lm_head.T * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    wanted = cross_entropy(scores, TARGETS, reduction="none")
    found = loss.token_losses(base, hidden, TARGETS)
    torch.testing.assert_close(found, wanted)
    (mine,) = torch.autograd.grad(found.sum(), hidden)
    (theirs,) = torch.autograd.grad(wanted.sum(), hidden)
    torch.testing.assert_close(mine, theirs)


def test_improbable_targets_have_finite_losses(base: Any) -> None:
    """Their share of the sum is zero in floating point, their loss is not infinite."""
    hidden = (1e4 * normal(ROWS, HIDDEN)).float().requires_grad_()
    narrow = base_of(base.lm_head.float())
    found = loss.token_losses(narrow, hidden, TARGETS)
    wanted = cross_entropy(hidden @ narrow.lm_head.T, TARGETS, reduction="none")
    assert found.max() > 1e3
    torch.testing.assert_close(found, wanted)


def test_a_row_that_is_not_finite_stays_alone(base: Any) -> None:
    hidden = normal(ROWS, HIDDEN)
    broken = hidden.clone()
    broken[20] = float("nan")
    results = []
    for given in (hidden, broken):
        leaf = given.requires_grad_()
        losses = loss.token_losses(base, leaf, TARGETS)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        results.append((losses.detach(), gradient))
    others = torch.arange(ROWS) != 20
    for right, wrong in zip(*results, strict=True):
        assert torch.equal(right[others], wrong[others])
        assert wrong[20].isnan().all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_changed_head(base: Any, frozen: bool) -> None:
    """Factors and rows of the head; also where nothing before the head needs a gradient."""
    hidden = normal(ROWS, HIDDEN).requires_grad_(not frozen)
    a, b, rows = (
        normal(*shape).requires_grad_() for shape in ((3, HIDDEN), (3, VOCAB), (2, HIDDEN))
    )
    ids = torch.tensor([4, 30], dtype=torch.int32)
    delta = AdapterDelta({(MODEL, "lm_head"): RowsDelta(a=a, b=b, token_ids=ids, rows=rows)})
    found = loss.summed_loss(base, delta, hidden, TARGETS)
    head = base.lm_head + b.T @ a
    head = head.index_add(0, ids.long(), rows)
    wanted = cross_entropy(hidden @ head.T, TARGETS, reduction="sum")
    torch.testing.assert_close(found, wanted)
    leaves = [a, b, rows] if frozen else [hidden, a, b, rows]
    mine, theirs = (torch.autograd.grad(3 * total, leaves) for total in (found, wanted))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(loss.summed_loss(base, delta, hidden, TARGETS), wanted)


def test_a_vocabulary_sets_how_many_rows_are_done_at_a_time() -> None:
    with mock.patch.object(loss, "_MOST_ROWS", 512):
        assert loss.chunk_rows(49_152) == 512
        assert loss.chunk_rows(262_144) * 262_144 * 4 <= 100 << 20
        assert loss.chunk_rows(10**8) == 16
