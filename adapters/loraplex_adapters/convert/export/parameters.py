"""The tensors of a merged checkpoint, one at a time, by their Hugging Face names.

    W' = diag(gain) W diag(in_gain) + B A,    bias' = gain * bias + the adapter's bias

where W is the base's weight as it is served, dequantised from NF4. To norms, embeddings and head
the adapter's changes are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from loraplex_model.base.config import MODEL, PROJECTIONS, DecoderConfig, NormSpan, Site
from loraplex_model.base.families import module_path, tensor_name
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights, NF4Matrix
from loraplex_model.ops import nf4

from loraplex_adapters.format.modules import EMBEDDING, HEAD

_BIASES: Mapping[str, tuple[str, ...]] = {
    "qkv_bias": PROJECTIONS[:3],
    "o_bias": PROJECTIONS[3:4],
    "mlp_bias": PROJECTIONS[4:],
}
"""The projections whose biases a field of `DecoderConfig` is about."""

Changes = Sequence[tuple[slice, ProjectionDelta]]
"""Changes of one of the checkpoint's matrices, by the rows that each is about."""


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
        biased: modules that have a bias, in every layer.
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
    settings = families.FAMILIES[config.architecture].settings
    for field, names in _BIASES.items():
        if missing := sorted(changed.intersection(names) - biased):
            key = settings.get(field)
            if not isinstance(key, str):
                path = module_path(config.architecture, 0, missing[0]).partition(".0.")[2]
                raise _unsupported(f"{config.architecture} cannot have a bias at {path}")
            overrides[key] = True
            for other, more in _BIASES.items():
                biased.update(more if settings.get(other) == key else ())
    biased |= {name for name in config.module_shapes() if biased.issuperset(config.parts_of(name))}
    tied = config.tie_embeddings and _same_rows(
        delta.at(EMBEDDING, RowsDelta), delta.at(HEAD, RowsDelta)
    )
    if tied != config.tie_embeddings:
        overrides["tie_word_embeddings"] = False
    return Form(frozenset(biased), tied, overrides)


def parameters(weights: BaseWeights, delta: AdapterDelta, form: Form) -> Iterator[Parameter]:
    """Every tensor of the merged checkpoint, in the order of the model."""
    config = weights.config
    architecture = config.architecture
    embed = delta.at(EMBEDDING, RowsDelta)
    yield _vocabulary(families.EMBED, weights.embed, embed, transposed=True)
    for index, layer in enumerate(weights.layers):
        for name, weight in layer.norms.items():
            if weight is not None:
                bias = layer.norm_biases.get(name)
                yield from _norm(config, (index, name), weight, bias, delta)
        for name in config.module_shapes():
            site = index, name
            matrix, bias = own_matrix(weights, site), own_bias(weights, site)
            changes = _changes(config, delta, site)
            yield _projection(tensor_name(architecture, *site), matrix, changes)
            if name in form.biased:
                at = tensor_name(architecture, *site, "bias")
                yield _bias(at, bias, matrix.shape[0], changes)
    yield from _norm(config, (MODEL, "norm"), weights.norm, weights.norm_bias, delta)
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


def _changes(config: DecoderConfig, delta: AdapterDelta, site: Site) -> Changes:
    """The changes of a module of the checkpoint, which may consist of several projections."""
    found: list[tuple[slice, ProjectionDelta]] = []
    start = 0
    for part in config.parts_of(site[1]):
        end = start + config.place(part)[2]
        change = delta.at((site[0], part), ProjectionDelta)
        if change is not None:
            found.append((slice(start, end), change))
        start = end
    return found


def _projection(name: str, matrix: NF4Matrix, changes: Changes) -> Parameter:
    base = partial(nf4.dequantize, matrix)
    changing = [(rows, change) for rows, change in changes if changes_matrix(change)]
    if not changing:
        return Parameter(name, base, None, matrix)

    def merged(weight: torch.Tensor) -> torch.Tensor:
        total = weight.clone()
        for rows, change in changing:
            total[rows] = merged_module(weight[rows], change)
        return total

    return Parameter(name, base, merged, matrix)


def _bias(name: str, own: torch.Tensor | None, width: int, changes: Changes) -> Parameter:
    base = partial(torch.zeros, width) if own is None else partial(_copy, own)
    if all(change.gain is None and change.bias is None for _, change in changes):
        return Parameter(name, base)

    def merged(bias: torch.Tensor) -> torch.Tensor:
        total = bias.clone()
        for rows, change in changes:
            if change.gain is not None:
                total[rows] *= change.gain
            if change.bias is not None:
                total[rows] += change.bias
        return total

    return Parameter(name, base, merged)


def _norm(
    config: DecoderConfig,
    site: Site,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    delta: AdapterDelta,
) -> Iterator[Parameter]:
    """A norm's weight and, if it has one, its bias, in the shapes of the checkpoint."""
    change = delta.at(site, NormDelta) or NormDelta()
    own_name = partial(tensor_name, config.architecture, *site)
    if bias is not None:
        yield _vector(own_name("bias"), bias, change.bias)
    name, heads = own_name(), weight.numel() // config.head_dim
    if "{head}" in name:
        for head, own in enumerate(weight.view(heads, -1)):
            added = None if change.weight is None else change.weight.view(heads, -1)[head]
            yield _vector(name.format(head=head), own, added)
    elif site[1] in ("q_norm", "k_norm") and config.qk_norm_span is NormSpan.EACH:
        added = None if change.weight is None else change.weight.view(heads, -1)
        yield _vector(name, weight.view(heads, -1), added)
    else:
        yield _vector(name, weight, change.weight)


def _vector(name: str, own: torch.Tensor, added: torch.Tensor | None) -> Parameter:
    return Parameter(name, partial(_copy, own), None if added is None else added.add)


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
