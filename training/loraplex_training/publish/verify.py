"""Verifies a saved adapter: reads it as a server does and runs it on the server's decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights, LayerWeights

from loraplex_training.run.generate import Generator
from loraplex_training.run.preflight import LIMITS
from loraplex_training.step.joint import JointPass

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest difference between the trainer's and the server's log-probabilities, by compute dtype."""

NOISE = 2.0
"""Alternative tolerance, as a multiple of the difference on the plain base model. That is rounding
alone, which grows with the model's depth."""

BROKEN = 1e-3
"""Upper bound of the alternative tolerance: larger differences cannot be rounding."""

MOST_PROBABLE = 20
"""Number of most probable tokens compared at each position, besides the token that follows."""

TOKENS = 256
"""Number of tokens of each example that are compared."""


def verify(
    folder: Path,
    trained: AdapterDelta,
    joint: JointPass,
    base: BaseWeights,
    examples: Sequence[Sequence[int]],
    cache: Path,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, float]:
    """Reads an adapter's directory as the server does and compares its output on some examples.

    Returns the adapter's digest and the largest difference between log-probabilities. Raises
    Refusal(PUBLISH_FAILED) if the server would refuse the adapter or compute something else.
    """
    served_by = in_float32(base) if base.embed.device.type == "cpu" else base
    try:
        digest = inspect(folder, served_by.info, LIMITS).digest
        _, delta = load(folder, digest, served_by, LIMITS)
    except Refusal as error:
        raise Refusal.listing(
            Reason.PUBLISH_FAILED,
            (f"the server would refuse the adapter: {f.message}" for f in error.problems),
        ) from error
    generator = Generator(served_by, cache)
    compared = [ids[:TOKENS] for ids in examples]

    def most_of(ours: AdapterDelta | None, read: AdapterDelta | None) -> float:
        return max(
            (_difference(joint.logits(ours, i), generator.logits(read, i), i) for i in compared),
            default=0.0,
        )

    most = most_of(trained, delta)
    coarse = torch.bfloat16 in (dtype, served_by.embed.dtype)
    allowed = TOLERANCE[torch.bfloat16 if coarse else torch.float32]
    if most > allowed and not coarse:
        allowed = max(allowed, min(NOISE * most_of(None, None), BROKEN))
    if most > allowed:
        raise Refusal(
            Reason.PUBLISH_FAILED,
            f"the server's log-probabilities differ from the trainer's by {most:.2g}, more than "
            f"{allowed:g}, so nothing was registered; this is a bug: please report it with the "
            "run's folder",
        )
    return digest, most


def _difference(trainer: torch.Tensor, server: torch.Tensor, ids: Sequence[int]) -> float:
    """Returns the largest difference between log-probabilities; infinite if one is not finite.

    Compares each position's most probable tokens and the token that follows. The logarithm of
    other, improbable tokens may differ by more because of rounding alone.
    """
    expected, found = (x.cpu().float().log_softmax(-1) for x in (trainer, server))
    likely = expected.topk(min(MOST_PROBABLE, expected.shape[-1])).indices
    following = torch.tensor([*ids[1:], ids[-1]])[:, None]
    compared = torch.cat([likely, following], 1)
    difference = (found.gather(1, compared) - expected.gather(1, compared)).abs().max()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def in_float32(base: BaseWeights) -> BaseWeights:
    """Returns the base model with dense tensors in float32, where the serving decoder is exact."""
    if base.embed.dtype == torch.float32:
        return base

    def wide(layer: LayerWeights) -> LayerWeights:
        found = {f.name: getattr(layer, f.name) for f in fields(layer)}
        dense = {name: t.float() for name, t in found.items() if isinstance(t, torch.Tensor)}
        return replace(layer, **dense)  # type: ignore[arg-type]

    embed = base.embed.float()
    layers = tuple(map(wide, base.layers))
    head = embed if base.lm_head is base.embed else base.lm_head.float()
    return replace(base, embed=embed, layers=layers, norm=base.norm.float(), lm_head=head)
