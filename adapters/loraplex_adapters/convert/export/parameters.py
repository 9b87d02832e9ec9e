"""The tensors of a merged checkpoint, one at a time, by their Hugging Face names.

    W' = diag(gain) W diag(in_gain) + B A,    bias' = gain * bias + the adapter's bias

where W is the base's weight as it is served, dequantised from NF4. To norms, embeddings and head
the adapter's changes are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from loraplex_model.adapters.delta import (
    AdapterDelta,
    BottleneckDelta,
    NormDelta,
    ProjectionDelta,
    RowsDelta,
)
from loraplex_model.adapters.merge import changes_matrix, merged_module, own_bias, own_matrix
from loraplex_model.base import families
from loraplex_model.base.config import MODEL, PROJECTIONS, DecoderConfig
from loraplex_model.base.families import tensor_name
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights, NF4Matrix
from loraplex_model.ops import nf4

from loraplex_adapters.format.modules import EMBEDDING, HEAD


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
        bias = change.bias if isinstance(change, ProjectionDelta) else None
        if bias is not None and bool(bias.any()):
            changed.add(name)
    overrides: dict[str, bool] = {}
    biased = set(config.biased)
    for key, names in (("attention_bias", PROJECTIONS[:4]), ("mlp_bias", PROJECTIONS[4:])):
        if missing := sorted(changed.intersection(names) - biased):
            if key not in families.FAMILIES[config.architecture].settings.values():
                message = f"{config.architecture} cannot have a bias at {missing[0]}"
                raise _unsupported(message)
            overrides[key] = True
            biased.update(names)
    tied = config.tie_embeddings and _same_rows(
        delta.at(EMBEDDING, RowsDelta), delta.at(HEAD, RowsDelta)
    )
    if tied != config.tie_embeddings:
        overrides["tie_word_embeddings"] = False
    return Form(frozenset(biased), tied, overrides)


def parameters(weights: BaseWeights, delta: AdapterDelta, form: Form) -> Iterator[Parameter]:
    """Every tensor of the merged checkpoint, in the order of the model."""
    architecture = weights.config.architecture
    embed = delta.at(EMBEDDING, RowsDelta)
    yield _vocabulary(families.EMBED, weights.embed, embed, transposed=True)
    for index, layer in enumerate(weights.layers):
        for name, weight in layer.norms.items():
            if weight is not None:
                own_name = tensor_name(architecture, index, name)
                yield _norm(own_name, weight, delta.at((index, name), NormDelta))
        for name in PROJECTIONS:
            site = index, name
            matrix, change = own_matrix(weights, site), delta.at(site, ProjectionDelta)
            yield _projection(tensor_name(architecture, *site), matrix, change)
            if name in form.biased:
                bias = own_bias(weights, site)
                yield _bias(tensor_name(architecture, *site, "bias"), bias, matrix.shape[0], change)
    yield _norm(families.NORM, weights.norm, delta.at((MODEL, "norm"), NormDelta))
    if not form.tied:
        head = delta.at(HEAD, RowsDelta)
        yield _vocabulary(families.LM_HEAD, weights.lm_head, head, transposed=False)


def _same_rows(embed: RowsDelta | None, head: RowsDelta | None) -> bool:
    """Whether embeddings and head change alike; False if that takes a product to find out."""
    if embed is None or head is None:
        return embed is head
    ours, theirs = embed.changed_rows, head.changed_rows
    if embed.a is not None or head.a is not None or ours is None or theirs is None:
        return False
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _copy(own: torch.Tensor) -> torch.Tensor:
    return own.float().clone()


def _projection(name: str, matrix: NF4Matrix, change: ProjectionDelta | None) -> Parameter:
    base = partial(nf4.dequantize, matrix)
    if change is None or not changes_matrix(change):
        return Parameter(name, base, None, matrix)
    return Parameter(name, base, partial(merged_module, change=change), matrix)


def _bias(
    name: str, own: torch.Tensor | None, width: int, change: ProjectionDelta | None
) -> Parameter:
    base = partial(torch.zeros, width) if own is None else partial(_copy, own)
    if change is None or (change.gain is None and change.bias is None):
        return Parameter(name, base)
    gain, added = change.gain, change.bias

    def merged(bias: torch.Tensor) -> torch.Tensor:
        total = bias.clone() if gain is None else bias * gain
        return total if added is None else total + added

    return Parameter(name, base, merged)


def _norm(name: str, own: torch.Tensor, change: NormDelta | None) -> Parameter:
    return Parameter(name, partial(_copy, own), None if change is None else change.weight.add)


def _vocabulary(
    name: str, own: torch.Tensor, change: RowsDelta | None, *, transposed: bool
) -> Parameter:
    """Embeddings, whose A and B are `transposed`, or the head."""
    if change is None:
        return Parameter(name, partial(_copy, own))
    factors, changed = change.factors, change.changed_rows

    def merged(weight: torch.Tensor) -> torch.Tensor:
        if factors is None:
            total = weight.clone()
        else:
            a, b = (factor.float() for factor in factors)
            total = torch.addmm(weight, a, b) if transposed else torch.addmm(weight, b.T, a)
        if changed is not None:
            token_ids, rows = changed
            total.index_add_(0, token_ids.long(), rows.float())
        return total

    return Parameter(name, partial(_copy, own), merged)


def _unsupported(why: str) -> Refusal:
    return Refusal(Reason.EXPORT_UNSUPPORTED, f"the adapter cannot be merged: {why}", "format")
