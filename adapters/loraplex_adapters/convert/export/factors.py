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
from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.modules import EMBEDDING, module_path, table_order


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


def factors_of(delta: AdapterDelta, what: str) -> dict[Site, Factors]:
    """Returns the factors of an adapter that A and B express fully, in the order of the model.

    Such are LoRA, rsLoRA, patterns and AdaLoRA. Modules of rank 0 are left out. `what` names the
    use in the message. Raises Refusal(EXPORT_UNSUPPORTED) for any other adapter.
    """
    if delta.virtual is not None:
        raise _refused(what, "the adapter has virtual tokens")
    found = {}
    for site in sorted(delta.sites, key=table_order):
        change = delta.sites[site]
        if (more := _more(change)) is not None:
            raise _refused(what, f"{module_path(*site)} has {more}")
        if isinstance(change, ProjectionDelta | RowsDelta) and change.factors is not None:
            a, b = change.factors
            a = a.T if site == EMBEDDING else a
            found[site] = Factors(a.float().contiguous(), b.float().T.contiguous())
    if not found:
        raise _refused(what, "the adapter changes nothing")
    return found


def delta_of(factors: FactorsBySite) -> AdapterDelta:
    """Returns the adapter that consists of these factors."""
    return AdapterDelta(
        {
            site: low_rank(site, f.a.T if site == EMBEDDING else f.a, f.b.T)
            for site, f in factors.items()
        }
    )


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
