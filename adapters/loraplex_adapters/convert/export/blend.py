"""One LoRA adapter out of several, each with a weight.

    cat    A and B side by side: exactly the sum that a mix of them computes; ranks add up
    svd    the nearest sum of a given rank (Eckart-Young)
    ties   trim each to its largest elements, elect a sign for every element, average those that
           have it (TIES, arXiv 2306.01708); then svd
    dare   drop elements at random, scale the others up, add (DARE, arXiv 2311.03099); then svd

Signs are elected before weights are applied, and the mean is over the adapters that agree, as PEFT
does both. ties and dare need every module's full matrices, one for each adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.convert.export.factors import Factors, FactorsBySite
from loraplex_adapters.format.modules import table_order

Weighted = tuple[Factors, float]


class Method(Enum):
    """How adapters are blended."""

    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    DARE = "dare"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to blend.

    Attributes:
        rank: of the result; cat has none to choose.
        density: the share of elements that ties and dare keep.
        seed: of dare.
    """

    method: Method
    rank: int | None = None
    density: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Blended:
    """The result, and |result - exact| / |exact| by module (0 for cat).

    "exact" is what the method makes before the rank is cut.
    """

    factors: FactorsBySite
    errors: Mapping[Site, float]


def check(recipe: Recipe) -> None:
    """Raises Refusal(FIELD_INVALID) for a recipe that says too little or too much."""
    method = recipe.method
    cuts = method is not Method.CAT
    if cuts and recipe.rank is None:
        raise _invalid("rank", f"{method.value} needs the rank of the result")
    if not cuts and recipe.rank is not None:
        raise _invalid("rank", "cat adds ranks up; svd cuts them")
    if recipe.rank is not None and recipe.rank < 1:
        raise _invalid("rank", "the rank must be at least 1")
    prunes = method in (Method.TIES, Method.DARE)
    if prunes != (recipe.density is not None):
        message = "ties and dare need the share of elements to keep; cat and svd keep all"
        raise _invalid("density", message)
    if recipe.density is not None and not 0 < recipe.density <= 1:
        raise _invalid("density", "the density must be above 0 and at most 1")


@torch.no_grad()
def blend(adapters: Sequence[tuple[FactorsBySite, float]], recipe: Recipe) -> Blended:
    """Blends adapters with their weights; a module that some of them lack is 0 there.

    Modules are taken in the order of the model, adapters in the given one, which decides what dare
    drops. Raises Refusal(FIELD_INVALID): the recipe, or weights that are not finite.
    """
    check(recipe)
    if not all(math.isfinite(weight) for _, weight in adapters):
        raise _invalid("weights", "the weights must be finite numbers")
    random = torch.Generator().manual_seed(recipe.seed)
    factors: dict[Site, Factors] = {}
    errors: dict[Site, float] = {}
    sites = {site for held, _ in adapters for site in held}
    for site in sorted(sites, key=table_order):
        parts = [(held[site], weight) for held, weight in adapters if site in held]
        factors[site], errors[site] = _module(parts, recipe, random)
    return Blended(factors, errors)


def concatenated(parts: Sequence[Weighted]) -> Factors:
    """A above A, and B beside B with the weights in them: the sum of the products."""
    return Factors(
        torch.cat([factors.a for factors, _ in parts]),
        torch.cat([factors.b * weight for factors, weight in parts], dim=1),
    )


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest product of at most `rank`, and its relative error, without the full matrix.

    B A = Qb (Rb Ra^T) Qa^T, so the singular values are those of the small matrix in the middle.
    """
    left, right = torch.linalg.qr(factors.b), torch.linalg.qr(factors.a.T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    return _cut(left.Q @ u, s, v @ right.Q.T, rank)


def ties(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Trims, elects and averages matrices of one shape."""
    trimmed = torch.stack([_trim(delta, density) for delta in deltas])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agreeing = trimmed.sign() == elected
    scale = torch.tensor(weights, dtype=trimmed.dtype).view(-1, 1, 1)
    return (trimmed * scale * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def dare(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float,
    random: torch.Generator,
) -> torch.Tensor:
    """Drops at random, scales up what is left, and adds matrices of one shape."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        kept = torch.bernoulli(torch.full_like(delta, density), generator=random)
        total += delta * kept / density * weight
    return total


def _module(
    parts: Sequence[Weighted], recipe: Recipe, random: torch.Generator
) -> tuple[Factors, float]:
    if recipe.method is Method.CAT:
        return concatenated(parts), 0.0
    assert recipe.rank is not None
    if recipe.method is Method.SVD:
        return truncated(concatenated(parts), recipe.rank)
    assert recipe.density is not None
    deltas = [factors.dense() for factors, _ in parts]
    weights = [weight for _, weight in parts]
    if recipe.method is Method.TIES:
        dense = ties(deltas, weights, recipe.density)
    else:
        dense = dare(deltas, weights, recipe.density, random)
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    return _cut(u, s, v, recipe.rank)


def _cut(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int) -> tuple[Factors, float]:
    """The first `rank` of u diag(s) v, half of each singular value on either side."""
    whole, lost = s.double().square().sum().item(), s[rank:].double().square().sum().item()
    root = s[:rank].sqrt()
    cut = Factors((root[:, None] * v[: len(root)]).contiguous(), u[:, : len(root)] * root)
    return cut, math.sqrt(lost / whole) if whole else 0.0


def _trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest elements by magnitude, all others 0."""
    if density >= 1:
        return delta
    count = int(density * delta.numel())
    kept = torch.zeros(delta.numel())
    kept[delta.abs().reshape(-1).topk(count).indices] = 1
    return delta * kept.view_as(delta)


def _invalid(field: str, message: str) -> Refusal:
    return Refusal(Reason.FIELD_INVALID, message, field)
