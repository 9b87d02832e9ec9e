"""LoRA's two matrices by module, from any kind of adapter that consists of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from loraplex_model.adapters.delta import (
    AdapterDelta,
    BottleneckDelta,
    NormDelta,
    ProjectionDelta,
    RowsDelta,
    SiteDelta,
    low_rank,
)
from loraplex_model.base.config import DecoderConfig, Site
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.modules import EMBEDDING, MATRICES, module_path, table_order
from loraplex_adapters.load.deltas import parts_of


@dataclass(frozen=True, slots=True)
class Factors:
    """A module's change B A, float32, with every scale in B.

    As in PEFT, `a` is [r, in] and `b` is [out, r]; at the embeddings "in" is the vocabulary and
    "out" the hidden width.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.a.shape[0]

    def dense(self) -> torch.Tensor:
        """The full matrix B A, [out, in]."""
        return self.b @ self.a


FactorsBySite = Mapping[Site, Factors]


def factors_of(delta: AdapterDelta, config: DecoderConfig, what: str) -> dict[Site, Factors]:
    """Returns the factors of an adapter that A and B express fully, in the order of the model.

    Such are LoRA, rsLoRA, patterns and AdaLoRA. Modules are those of the base's checkpoint; those
    of rank 0 are left out. `what` names the use in the message. Raises Refusal(EXPORT_UNSUPPORTED)
    for any other adapter.
    """
    if delta.virtual is not None:
        raise _refused(what, "the adapter has virtual tokens")
    found = {}
    for site in sorted(delta.sites, key=table_order):
        change = delta.sites[site]
        if (more := _more(change)) is not None:
            raise _refused(what, f"{module_path(config.architecture, *site)} has {more}")
        if isinstance(change, ProjectionDelta | RowsDelta) and change.factors is not None:
            a, b = change.factors
            a = a.T if site == EMBEDDING else a
            found[site] = Factors(a.float().contiguous(), b.float().T.contiguous())
    if not found:
        raise _refused(what, "the adapter changes nothing")
    return _joined(found, config)


def delta_of(factors: FactorsBySite, config: DecoderConfig) -> AdapterDelta:
    """Returns the adapter that consists of these factors, at modules of the base's checkpoint."""
    sites: dict[Site, SiteDelta] = {}
    for site, found in factors.items():
        if site[1] in MATRICES:
            sites |= parts_of(site, ProjectionDelta(found.a, found.b.T), config)
        else:
            a = found.a.T if site == EMBEDDING else found.a
            sites[site] = low_rank(site, a, found.b.T)
    return AdapterDelta(sites)


def _joined(factors: Mapping[Site, Factors], config: DecoderConfig) -> dict[Site, Factors]:
    """The factors with those of projections that the checkpoint joins as one product."""
    whole = {part: name for name in config.module_shapes() for part in config.parts_of(name)}
    found: dict[Site, Factors] = {}
    for (layer, name), own in factors.items():
        site = layer, whole.get(name, name)
        if site == (layer, name):
            found[site] = own
        elif site not in found:
            parts = {part: factors.get((layer, part)) for part in config.parts_of(site[1])}
            found[site] = _stacked(parts, config)
    return found


def _stacked(parts: Mapping[str, Factors | None], config: DecoderConfig) -> Factors:
    """One product for several projections of one input, whose outputs lie side by side.

    Parts of one module of a file have the same A, which is kept; otherwise the ranks add up.
    """
    held = [part for part in parts.values() if part is not None]
    shares = all(part.a is held[0].a or torch.equal(part.a, held[0].a) for part in held)
    rank = held[0].rank if shares else sum(part.rank for part in held)
    rows, start = [], 0
    for name, part in parts.items():
        b = torch.zeros(config.place(name)[2], rank)
        if part is not None:
            b[:, start : start + part.rank] = part.b
            start += 0 if shares else part.rank
        rows.append(b)
    a = held[0].a if shares else torch.cat([part.a for part in held])
    return Factors(a, torch.cat(rows))


def _more(change: SiteDelta) -> str | None:
    """The part of a change that A and B cannot express; None if there is none."""
    match change:
        case BottleneckDelta():
            return "a bottleneck"
        case NormDelta():
            return "a trained norm"
        case RowsDelta():
            return "trained rows" if change.rows is not None else None
    if change.gain is not None:
        return "gains (DoRA, IA3)"
    if change.in_gain is not None:
        return "gains of its input (IA3)"
    return "a bias" if change.bias is not None else None


def _refused(what: str, why: str) -> Refusal:
    return Refusal(Reason.EXPORT_UNSUPPORTED, f"{what} can hold A and B only, but {why}", "format")
