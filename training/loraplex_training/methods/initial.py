"""Initial values of LoRA's matrices.

default    A as `torch.nn.Linear` starts (uniform), B = 0: the adapter starts as the base's function
gaussian   A normal with std 1 / r, B = 0
random     A and B both as `torch.nn.Linear` starts: the function differs from the base's from the
           first step on (PEFT's init_lora_weights=False)
pissa      the principal singular components of the base's weight (arXiv 2404.02948). Only the
           difference B A - B0 A0 to the initial product is added to the base, which stays whole.
           PEFT subtracts B0 A0 from the base instead, which is the same function.
loftq      the quantisation error (arXiv 2310.08659): B A starts as the best fit of W - Q at rank r,
           W being the weights before quantisation. Q is shared between adapters, so it is not
           quantised again for W - B A as in LoftQ's further rounds; PEFT's default is one, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from loraplex_model.base.config import Site
from loraplex_model.base.families import tensor_name
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.checkpoint import TensorSource, open_source
from pydantic import Field

from loraplex_training.methods.options import OptionProblems, TargetOptions
from loraplex_training.methods.targets import shape, weight
from loraplex_training.spec.fields import Count, one_of

INITIALISATIONS = ("default", "gaussian", "random", "pissa", "loftq")

_OVERSAMPLING = 8
_LARGEST_RESIDUAL = 0.2  # of |W|: NF4's error is 0.09 on normal weights; other weights give 1.4


class StartOptions(TargetOptions):
    """Options of the initial values of A and B."""

    init: Annotated[str, one_of(INITIALISATIONS)] = "default"
    """Initial values: default, gaussian, random, pissa (principal components of the base's weights)
    or loftq (the quantisation error)."""
    svd_iterations: Annotated[Count, Field(le=64)] = 8
    """Rounds of subspace iteration for pissa and loftq. 0 computes the exact decomposition."""
    loftq_source: str = ""
    """Directory or .gguf file of the weights before quantisation, for loftq."""


Pair = tuple[torch.Tensor, torch.Tensor]
"""A module's matrices A [r, in] and B [out, r], float32."""

Initialise = Callable[[Site, int, float], Pair]
"""Initial values by `(site, rank, scale)`; called once per module, in the order of the model."""


def initialisation(
    options: StartOptions,
    base: BaseWeights,
    ranks: Mapping[Site, int],
    chance: torch.Generator,
    problems: OptionProblems,
) -> Initialise:
    """Returns the function of `options.init`."""
    name, source = options.init, options.loftq_source
    if "svd_iterations" in options.model_fields_set and name not in ("pissa", "loftq"):
        text = f"svd_iterations: nothing is decomposed where init is {name!r}"
        problems.add("svd_iterations", text)
    if source and name != "loftq":
        text = f"loftq_source: it means something with init=loftq only, not {name!r}"
        problems.add("loftq_source", text)
    if name in ("pissa", "loftq"):
        _check_ranks(base, ranks, problems)
    largest = partial(_largest_parts, iterations=options.svd_iterations, chance=chance)
    if name == "pissa":
        return lambda site, rank, scale: largest(weight(base, site), rank, scale)
    if name == "loftq":
        try:
            return partial(_loftq, base, largest, _open(source))
        except (Refusal, ValueError) as error:
            problems.add("loftq_source", f"loftq_source: {error}")
    return partial(_drawn, base, name, chance)


def _drawn(
    base: BaseWeights, name: str, chance: torch.Generator, site: Site, rank: int, scale: float
) -> Pair:
    """Draws from PEFT's distributions, with the job's generator; ignores the base's weights."""
    fan_in, fan_out = shape(base, site)
    if name == "gaussian":
        a = torch.randn(rank, fan_in, generator=chance) / rank
    else:
        a = _uniform(rank, fan_in, chance)
    b = _uniform(fan_out, rank, chance) if name == "random" else torch.zeros(fan_out, rank)
    return a, b


def _uniform(fan_out: int, fan_in: int, chance: torch.Generator) -> torch.Tensor:
    """Draws from (-1, 1) / sqrt(fan_in), as torch's layers start (Kaiming with a = sqrt(5))."""
    return (2 * torch.rand(fan_out, fan_in, generator=chance) - 1) / math.sqrt(fan_in)


def _loftq(
    base: BaseWeights,
    largest: Callable[[torch.Tensor, int, float], Pair],
    source: TensorSource,
    site: Site,
    rank: int,
    scale: float,
) -> Pair:
    served = weight(base, site)
    name = tensor_name(base.config.architecture, *site)
    try:
        original = source.read(name).to(served.device, torch.float32)
    except Refusal as error:
        raise _not_the_source(str(error)) from error
    if original.shape != served.shape:
        raise _not_the_source(f"{name} is {list(original.shape)}, not {list(served.shape)}")
    residual = original - served
    share = float(residual.norm() / original.norm())
    if not share < _LARGEST_RESIDUAL:
        raise _not_the_source(f"{name} differs from the base's by {share:.0%}, NF4 does by 9%")
    return largest(residual, rank, scale)


def _not_the_source(why: str) -> Refusal:
    return Refusal(
        Reason.METHOD_INVALID,
        f"loftq_source is not the checkpoint that this base was quantised from: {why}",
    )


def _open(source: str) -> TensorSource:
    """Opens the weights before quantisation. Raises ValueError or Refusal if that is impossible."""
    if not source:
        raise ValueError(
            "LoftQ fits the quantisation error, which the base alone does not show; give the "
            "directory (or .gguf file) of the weights before quantisation"
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"there is no {path}")
    found = open_source(path)
    if any(name.endswith(".weight.absmax") for name in found.names()):
        raise ValueError(f"{path} is quantised itself; give the weights before that")
    return found


def _check_ranks(base: BaseWeights, ranks: Mapping[Site, int], problems: OptionProblems) -> None:
    smallest = {site[1]: min(shape(base, site)) for site in ranks}
    for name, rank in sorted({(site[1], rank) for site, rank in ranks.items()}):
        if rank > smallest[name]:
            problems.add("r", f"r: {name} has only {smallest[name]} singular values, not {rank}")


def _largest_parts(
    matrix: torch.Tensor, rank: int, scale: float, *, iterations: int, chance: torch.Generator
) -> Pair:
    """Returns A [r, in] and B [out, r] with scale * B A the best fit of `matrix` [out, in].

    With `iterations` 0 the decomposition is exact. Otherwise it takes that many rounds of subspace
    iteration with a few directions more than `rank` (arXiv 0909.4061): faster and nearly as good.
    """
    if iterations:
        width = min(rank + _OVERSAMPLING, *matrix.shape)
        basis = torch.randn(matrix.shape[1], width, generator=chance).to(matrix.device)
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
        out = torch.linalg.qr(matrix @ basis).Q
        u, values, vh = torch.linalg.svd(out.T @ matrix, full_matrices=False)
        u = out @ u
    else:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
