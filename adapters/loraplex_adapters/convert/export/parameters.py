"""The tensors of a merged checkpoint, one at a time, by their Hugging Face names.

    W' = diag(gain) W diag(in_gain) + B A,    bias' = gain * bias + the adapter's bias

where W is the base's weight as it is served, dequantised from NF4. To norms, embeddings and head
the adapter's changes are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from loraplex_model.adapters.delta import (
    AdapterDelta,
    BottleneckDelta,
    NormDelta,
    ProjectionDelta,
    RowsDelta,
)
from loraplex_model.adapters.merge import changes_matrix, fused_matrix, merged_module
from loraplex_model.base import families
from loraplex_model.base.config import FUSED, MODEL, DecoderConfig
from loraplex_model.base.families import tensor_name
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.ops import nf4

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of the checkpoint.

    Attributes:
        base: computes the base's value, float32, in memory that may be overwritten.
        change: computes the merged value from the base's, in new memory; None if it is unchanged.
        matrix: NF4 form of a projection's weight in the base; None for other tensors.
    """

    name: str
    base: Callable[[], torch.Tensor]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    matrix: NF4Matrix | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """Differences between a merged checkpoint's configuration and the base's.

    Attributes:
        biased: projections that have a bias, in every layer.
        tied: whether head and embeddings are one tensor.
        overrides: entries of config.json that replace the base's.
    """

    biased: frozenset[str]
    tied: bool
    overrides: Mapping[str, bool]


def merged_form(config: DecoderConfig, delta: AdapterDelta) -> Form:
    """Returns the form of the base with an adapter merged into it.

    Raises Refusal(EXPORT_UNSUPPORTED) if the adapter has virtual tokens or bottlenecks, which the
    base's architecture has no weights for, or biases that this architecture cannot have.
    """
    if delta.virtual is not None:
        raise _unsupported("virtual tokens are part of the prompt, not of the weights")
    changed: set[str] = set()
    for (layer, name), change in delta.sites.items():
        if isinstance(change, BottleneckDelta):
            raise _unsupported(f"the {name.replace('_', ' ')} of layer {layer} is not linear")
        if isinstance(change, ProjectionDelta) and _has_bias(change):
            changed.add(name)
    overrides: dict[str, bool] = {}
    biased = set(config.biased)
    for key, names in (("attention_bias", _ATTENTION), ("mlp_bias", _MLP)):
        if missing := sorted(changed.intersection(names) - biased):
            if key not in families.FAMILIES[config.architecture].bias_options:
                message = f"{config.architecture} cannot have a bias at {missing[0]}"
                raise _unsupported(message)
            overrides[key] = True
            biased.update(names)
    tied = config.tie_embeddings and _same_rows(
        delta.at((MODEL, "embed_tokens"), RowsDelta), delta.at((MODEL, "lm_head"), RowsDelta)
    )
    if tied != config.tie_embeddings:
        overrides["tie_word_embeddings"] = False
    return Form(frozenset(biased), tied, overrides)


def parameters(weights: BaseWeights, delta: AdapterDelta, form: Form) -> Iterator[Parameter]:
    """Every tensor of the merged checkpoint, in the order of the model."""
    embed = delta.at((MODEL, "embed_tokens"), RowsDelta)
    yield _vocabulary(families.EMBED, weights.embed, embed, _embedding_change)
    for index, layer in enumerate(weights.layers):
        yield from _norms(index, layer, delta)
        for fused, names in FUSED.items():
            matrix, bias = fused_matrix(layer, fused)
            biases = None if bias is None else torch.split(bias, list(matrix.rows))
            for i, (name, module) in enumerate(zip(names, nf4.split(matrix), strict=True)):
                change = delta.at((index, name), ProjectionDelta)
                yield _projection(tensor_name(index, name), module, change)
                if name in form.biased:
                    own = None if biases is None else biases[i]
                    at = tensor_name(index, name, "bias")
                    yield _bias(at, own, module.shape[0], change)
    norm = delta.at((MODEL, "norm"), NormDelta)
    yield _vector(families.NORM, weights.norm, norm)
    if not form.tied:
        head = delta.at((MODEL, "lm_head"), RowsDelta)
        yield _vocabulary(families.LM_HEAD, weights.lm_head, head, _head_change)


def _has_bias(change: ProjectionDelta) -> bool:
    return change.bias is not None and bool(change.bias.any())


def _same_rows(embed: RowsDelta | None, head: RowsDelta | None) -> bool:
    """Whether embeddings and head change alike; False if that takes a product to find out."""
    if embed is None or head is None:
        return embed is head
    ours, theirs = embed.changed_rows, head.changed_rows
    if embed.a is not None or head.a is not None or ours is None or theirs is None:
        return False
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _projection(name: str, matrix: NF4Matrix, change: ProjectionDelta | None) -> Parameter:
    def base() -> torch.Tensor:
        return nf4.dequantize(matrix)

    if change is None or not changes_matrix(change):
        return Parameter(name, base, None, matrix)
    found = change
    return Parameter(name, base, lambda weight: merged_module(weight, found), matrix)


def _bias(
    name: str, own: torch.Tensor | None, width: int, change: ProjectionDelta | None
) -> Parameter:
    def base() -> torch.Tensor:
        return torch.zeros(width) if own is None else own.float().clone()

    def merged(bias: torch.Tensor) -> torch.Tensor:
        assert change is not None
        total = bias.clone() if change.gain is None else bias * change.gain
        return total if change.bias is None else total + change.bias

    changes = change is not None and (change.gain is not None or change.bias is not None)
    return Parameter(name, base, merged if changes else None)


def _vector(name: str, own: torch.Tensor, change: NormDelta | None) -> Parameter:
    def base() -> torch.Tensor:
        return own.float().clone()

    if change is None:
        return Parameter(name, base)
    added = change.weight
    return Parameter(name, base, lambda weight: weight + added)


def _norms(index: int, layer: LayerWeights, delta: AdapterDelta) -> Iterator[Parameter]:
    for name, weight in layer.norms.items():
        if weight is not None:
            yield _vector(tensor_name(index, name), weight, delta.at((index, name), NormDelta))


def _vocabulary(
    name: str,
    own: torch.Tensor,
    change: RowsDelta | None,
    factors: Callable[[torch.Tensor, RowsDelta], torch.Tensor],
) -> Parameter:
    def base() -> torch.Tensor:
        return own.float().clone()

    def merged(weight: torch.Tensor) -> torch.Tensor:
        assert change is not None
        total = factors(weight, change)
        if change.changed_rows is not None:
            token_ids, rows = change.changed_rows
            total.index_add_(0, token_ids.long(), rows.float())
        return total

    return Parameter(name, base, None if change is None else merged)


def _embedding_change(weight: torch.Tensor, change: RowsDelta) -> torch.Tensor:
    if change.factors is None:
        return weight.clone()
    a, b = change.factors
    return torch.addmm(weight, a.float(), b.float())


def _head_change(weight: torch.Tensor, change: RowsDelta) -> torch.Tensor:
    if change.factors is None:
        return weight.clone()
    a, b = change.factors
    return torch.addmm(weight, b.float().T, a.float())


def _unsupported(why: str) -> Refusal:
    return Refusal(Reason.EXPORT_UNSUPPORTED, f"the adapter cannot be merged: {why}", "format")
