"""Blends several weighted LoRA adapters into one.

    cat    concatenates A and B: exactly the weighted sum; the ranks add up
    svd    the best approximation of that sum with a given rank (Eckart-Young)
    ties   trims each adapter to its largest elements, elects a sign for every element, and averages
           the elements that have it (TIES, arXiv 2306.01708); then svd
    dare   drops elements at random, scales up the others, and adds (DARE, arXiv 2311.03099);
           then svd

As in PEFT, signs are elected before weights are applied, and the mean is over the adapters that
agree. ties and dare compute every module's full matrix, one for each adapter.
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


class BlendMethod(Enum):
    """Method of blending; see the module's docstring."""

    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    DARE = "dare"


@dataclass(frozen=True, slots=True)
class BlendSpec:
    """Method of a blend and its parameters.

    Attributes:
        rank: rank of the result; None for cat.
        density: share of the elements that ties and dare keep; None for cat and svd.
        seed: random seed of dare.
    """

    method: BlendMethod
    rank: int | None = None
    density: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Blended:
    """The result of a blend.

    Attributes:
        factors: A and B of every module.
        errors: relative error of cutting the rank, |result - exact| / |exact|, by module; 0 for
            cat. "exact" is the method's result before its rank is cut.
    """

    factors: FactorsBySite
    errors: Mapping[Site, float]


def check(spec: BlendSpec) -> None:
    """Raises Refusal(FIELD_INVALID) if a parameter is missing, superfluous or out of range."""
    method = spec.method
    cuts = method is not BlendMethod.CAT
    if cuts and spec.rank is None:
        raise _invalid("rank", f"{method.value} needs the rank of the result")
    if not cuts and spec.rank is not None:
        raise _invalid("rank", "cat takes no rank: the ranks add up; use svd to cut them")
    if spec.rank is not None and spec.rank < 1:
        raise _invalid("rank", "the rank must be at least 1")
    prunes = method in (BlendMethod.TIES, BlendMethod.DARE)
    if prunes != (spec.density is not None):
        message = "ties and dare need the share of elements to keep; cat and svd keep all"
        raise _invalid("density", message)
    if spec.density is not None and not 0 < spec.density <= 1:
        raise _invalid("density", "the density must be above 0 and at most 1")


@torch.no_grad()
def blend(adapters: Sequence[tuple[FactorsBySite, float]], spec: BlendSpec) -> Blended:
    """Blends weighted adapters; a module that an adapter lacks counts as 0 in it.

    Modules are processed in the order of the model and adapters in the given order, which decides
    what dare drops. Raises Refusal(FIELD_INVALID): as `check`, or weights that are not finite.
    """
    check(spec)
    if not all(math.isfinite(weight) for _, weight in adapters):
        raise _invalid("weights", "the weights must be finite numbers")
    random = torch.Generator().manual_seed(spec.seed)
    factors: dict[Site, Factors] = {}
    errors: dict[Site, float] = {}
    sites = {site for held, _ in adapters for site in held}
    for site in sorted(sites, key=table_order):
        parts = [(held[site], weight) for held, weight in adapters if site in held]
        factors[site], errors[site] = _module(parts, spec, random)
    return Blended(factors, errors)


def concatenated(parts: Sequence[Weighted]) -> Factors:
    """Stacks A by rows and weighted B by columns: the weighted sum of the products B A."""
    return Factors(
        torch.cat([factors.a for factors, _ in parts]),
        torch.cat([factors.b * weight for factors, weight in parts], dim=1),
    )


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Returns the nearest product of at most `rank`, and its relative error.

    The full matrix is not computed: B A = Qb (Rb Ra^T) Qa^T, so the singular values are those of
    the small matrix in the middle.
    """
    left, right = torch.linalg.qr(factors.b), torch.linalg.qr(factors.a.T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    return _cut(left.Q @ u, s, v @ right.Q.T, rank)


def ties(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Trims, elects signs and averages matrices of one shape; see the module's docstring."""
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
    """Drops elements at random, scales up the others, and adds matrices of one shape."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        kept = torch.bernoulli(torch.full_like(delta, density), generator=random)
        total += delta * kept / density * weight
    return total


def _module(
    parts: Sequence[Weighted], spec: BlendSpec, random: torch.Generator
) -> tuple[Factors, float]:
    if spec.method is BlendMethod.CAT:
        return concatenated(parts), 0.0
    assert spec.rank is not None
    if spec.method is BlendMethod.SVD:
        return truncated(concatenated(parts), spec.rank)
    assert spec.density is not None
    deltas = [factors.dense() for factors, _ in parts]
    weights = [weight for _, weight in parts]
    if spec.method is BlendMethod.TIES:
        dense = ties(deltas, weights, spec.density)
    else:
        dense = dare(deltas, weights, spec.density, random)
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    return _cut(u, s, v, spec.rank)


def _cut(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int) -> tuple[Factors, float]:
    """The first `rank` components of u diag(s) v, with sqrt(s) in both factors, and the error."""
    whole, lost = s.double().square().sum().item(), s[rank:].double().square().sum().item()
    root = s[:rank].sqrt()
    cut = Factors((root[:, None] * v[: len(root)]).contiguous(), u[:, : len(root)] * root)
    return cut, math.sqrt(lost / whole) if whole else 0.0


def _trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keeps the largest elements by magnitude and sets all others to 0."""
    if density >= 1:
        return delta
    count = int(density * delta.numel())
    kept = torch.zeros(delta.numel())
    kept[delta.abs().reshape(-1).topk(count).indices] = 1
    return delta * kept.view_as(delta)


def _invalid(field: str, message: str) -> Refusal:
    return Refusal(Reason.FIELD_INVALID, message, field)
