"""Whether a folder is what was trained: read as a server reads it, run on its decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights

from loraplex_training.run.generate import Generator
from loraplex_training.step.joint import JointPass

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""By how much log-probabilities of trainer and server may differ, by the type that computes."""

NOISE = 2.0
"""Or so many times what they differ by on the bare base, where there is nothing but rounding: deep
models round more."""

BROKEN = 1e-3
"""Beyond this it is no rounding, whatever the base says."""

MOST_PROBABLE = 20
"""Tokens whose log-probabilities a server tells; each position's own is compared too."""

LIMITS = AdapterLimits(max_rank=1 << 12, max_virtual_tokens=1 << 14)
"""What a server with other limits does not take can still be exported."""

TOKENS = 256  # of each example


def verify(
    folder: Path,
    trained: AdapterDelta,
    joint: JointPass,
    base: BaseWeights,
    examples: Sequence[Sequence[int]],
    cache: Path,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, float]:
    """Reads the folder as the server does and compares what both make of some examples.

    Returns the digest and the largest difference of log-probabilities.
    Raises Refusal(PUBLISH_FAILED): the server would refuse it, or say something else.
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
    """The largest between log-probabilities that matter; infinite if one is not finite.

    Of each position's most probable tokens and of the one that follows: of a token that is never
    chosen, rounding alone may move the logarithm by more.
    """
    expected, found = (x.cpu().float().log_softmax(-1) for x in (trainer, server))
    likely = expected.topk(min(MOST_PROBABLE, expected.shape[-1])).indices
    following = torch.tensor([*ids[1:], ids[-1]])[:, None]
    compared = torch.cat([likely, following], 1)
    difference = (found.gather(1, compared) - expected.gather(1, compared)).abs().max()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def in_float32(base: BaseWeights) -> BaseWeights:
    """The same base with its dense tensors in float32, in which the serving decoder is exact."""
    if base.embed.dtype == torch.float32:
        return base

    def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.float()

    embed = base.embed.float()
    layers = tuple(
        replace(
            layer,
            input_norm=layer.input_norm.float(),
            post_norm=layer.post_norm.float(),
            qkv_bias=wide(layer.qkv_bias),
            o_bias=wide(layer.o_bias),
            q_norm=wide(layer.q_norm),
            k_norm=wide(layer.k_norm),
        )
        for layer in base.layers
    )
    head = embed if base.lm_head is base.embed else base.lm_head.float()
    return replace(base, embed=embed, layers=layers, norm=base.norm.float(), lm_head=head)
