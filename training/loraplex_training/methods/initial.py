"""What LoRA's matrices start from.

default    A as `torch.nn.Linear` starts (uniform), B = 0: the start is the base's function
gaussian   A normal, std 1 / r, B = 0
random     A and B both as `torch.nn.Linear` starts: another function than the base's from the
           first step on (PEFT's init_lora_weights=False)
pissa      the principal singular parts of the base's weight (arXiv 2404.02948): B A moves away
           from what it was, and only the difference B A - B0 A0 is added to the base, which
           stays whole. PEFT takes B0 A0 out of the base instead, which is the same function.
loftq      what quantisation took away (arXiv 2310.08659): B A starts as the best fit of W - Q
           at rank r, W being the weights before quantisation. Q is shared, so it is not chosen
           anew for W - B A as LoftQ's further rounds do; one round is PEFT's default too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from loraplex_model.base.config import Site
from loraplex_model.base.families import tensor_name
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints import prequantised
from loraplex_model.checkpoints.checkpoint import TensorSource, open_source

from loraplex_training.methods.options import Options
from loraplex_training.methods.targets import shape, weight

INITIALISATIONS = ("default", "gaussian", "random", "pissa", "loftq")

_Decompose = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]
_ITERATIONS = 8  # more bring next to nothing
_OVERSAMPLING = 8
_LARGEST_RESIDUAL = 0.2  # of |W|: NF4 leaves 0.09 of normal weights, other weights' own 1.4


@dataclass(frozen=True, slots=True)
class Start:
    """A module's first matrices, float32: a [r, in], b [out, r].

    `subtracted`: what these matrices make at the start is taken off again, always.
    """

    a: torch.Tensor
    b: torch.Tensor
    subtracted: bool = False


Initialise = Callable[[Site, int, float], Start]
"""`(site, rank, scale)`; called once for every module, in the order of the model."""


def read_initialisation(
    options: Options,
    name: str,
    base: BaseWeights,
    ranks: Mapping[Site, int],
    chance: torch.Generator,
) -> Initialise:
    """One of `INITIALISATIONS`; reads the options of it, `svd_iterations` and `loftq_source`."""
    iterations = options.integer("svd_iterations", _ITERATIONS, 0, 64)
    source = options.text("loftq_source", "")
    if options.given("svd_iterations") and name not in ("pissa", "loftq"):
        options.refuse(f"svd_iterations: nothing is decomposed where init is {name!r}")
    if source and name != "loftq":
        options.refuse(f"loftq_source: it means something with init=loftq only, not {name!r}")
    if name in ("pissa", "loftq"):
        _check_ranks(options, base, ranks)
    largest = partial(_largest_parts, iterations=iterations, chance=chance)
    if name == "pissa":
        return partial(_pissa, base, largest)
    if name == "loftq":
        return partial(_loftq, base, largest, _open(options, base, source))
    return partial(_drawn, base, name, chance)


def _drawn(
    base: BaseWeights, name: str, chance: torch.Generator, site: Site, rank: int, scale: float
) -> Start:
    """Without a look at the weights; PEFT's distributions, from our own generator."""
    fan_in, fan_out = shape(base, site)
    if name == "gaussian":
        a = torch.randn(rank, fan_in, generator=chance) / rank
    else:
        a = _uniform(rank, fan_in, chance)
    b = _uniform(fan_out, rank, chance) if name == "random" else torch.zeros(fan_out, rank)
    return Start(a, b)


def _uniform(fan_out: int, fan_in: int, chance: torch.Generator) -> torch.Tensor:
    """Kaiming's with a = sqrt(5), as layers of torch start: within 1 / sqrt(fan_in)."""
    return (2 * torch.rand(fan_out, fan_in, generator=chance) - 1) / math.sqrt(fan_in)


def _pissa(base: BaseWeights, largest: _Decompose, site: Site, rank: int, scale: float) -> Start:
    b, a = largest(weight(base, site), rank, scale)
    return Start(a, b, subtracted=True)


def _loftq(
    base: BaseWeights,
    largest: _Decompose,
    source: TensorSource | None,
    site: Site,
    rank: int,
    scale: float,
) -> Start:
    assert source is not None, "read_initialisation has noted that it is missing"
    served = weight(base, site)
    name = tensor_name(*site)
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
    b, a = largest(residual, rank, scale)
    return Start(a, b)


def _not_the_source(why: str) -> Refusal:
    return Refusal(
        Reason.METHOD_INVALID,
        f"loftq_source is not the checkpoint that this base was quantised from: {why}",
    )


def _open(options: Options, base: BaseWeights, source: str) -> TensorSource | None:
    if not source:
        options.refuse(
            "loftq_source: LoftQ fits what quantisation took away, and the base has only what it "
            "left; give the directory (or .gguf file) of the weights before quantisation"
        )
        return None
    path = Path(source).expanduser()
    if not path.exists():
        options.refuse(f"loftq_source: there is no {path}")
        return None
    try:
        found = open_source(path)
        quantised = prequantised.is_nf4(found, tensor_name(0, "q_proj"))
    except Refusal as error:
        options.refuse(f"loftq_source: {error}")
        return None
    if quantised:
        options.refuse(f"loftq_source: {path} is quantised itself; give the weights before that")
        return None
    return found


def _check_ranks(options: Options, base: BaseWeights, ranks: Mapping[Site, int]) -> None:
    smallest = {site[1]: min(shape(base, site)) for site in ranks}
    for name, rank in sorted({(site[1], rank) for site, rank in ranks.items()}):
        if rank > smallest[name]:
            options.refuse(f"r: {name} has only {smallest[name]} singular values, not {rank}")


def _largest_parts(
    matrix: torch.Tensor, rank: int, scale: float, *, iterations: int, chance: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, r] and A [r, in] with scale * B A the best fit of `matrix` [out, in] at this rank.

    `iterations` is 0 for the whole decomposition; otherwise as many rounds of subspace iteration
    on a few more directions than asked for (arXiv 0909.4061), which is faster and nearly as good.
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
    return u[:, :rank] * root, root[:, None] * vh[:rank]
