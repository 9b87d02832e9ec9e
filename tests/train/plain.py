"""The pass as it reads in the papers: every intermediate kept, whole logits, autograd's own
derivatives, rows picked by index. Slow, and what the fast pass must equal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from itertools import pairwise
from unittest import mock

import torch
from loraplex_model.adapters.delta import AdapterDelta, VirtualTokens
from loraplex_model.adapters.mix import RowGroup
from loraplex_model.base.weights import BaseWeights, NF4Matrix
from loraplex_model.decoder import forward
from loraplex_model.ops import autograd, nf4, rope
from loraplex_training.data.samples import IGNORED
from loraplex_training.step.joint import Part


@dataclass
class Fixed:
    """Any `AdapterDelta` as an adapter in training: each of its tensors is a parameter."""

    given: AdapterDelta
    dropout: float = 0.0
    settled = 0
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)

    def delta(self) -> AdapterDelta:
        sites = {
            site: type(change)(**{f.name: self._leaf(f"{site}.{f.name}", getattr(change, f.name))
                                  for f in fields(change)})
            for site, change in self.given.sites.items()
        }  # fmt: skip
        if self.given.virtual is None:
            return AdapterDelta(sites)
        virtual = {
            f.name: self._leaf(f.name, getattr(self.given.virtual, f.name))
            for f in fields(VirtualTokens)
        }
        return AdapterDelta(sites, VirtualTokens(**virtual))

    def _leaf(self, name: str, value: object) -> object:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if name not in self.parameters:
            self.parameters[name] = value.detach().clone().requires_grad_()
        return self.parameters[name]

    def gradients(self) -> dict[str, torch.Tensor]:
        """By name, where there are any; takes them away."""
        found = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None
        return found

    def to(self, dtype: torch.dtype) -> Fixed:
        """The same values in another type."""
        self.delta()
        wide = {n: p.detach().to(dtype).requires_grad_() for n, p in self.parameters.items()}
        return Fixed(self.given, self.dropout, wide)


def losses(base: BaseWeights, parts: Sequence[Part]) -> list[torch.Tensor]:
    """The sum of each part's token losses, differentiable in its adapter's parameters."""
    return [_loss(base, part) for part in parts]


def _loss(base: BaseWeights, part: Part) -> torch.Tensor:
    """Sequence by sequence."""
    delta = part.adapter.delta() if part.adapter else None
    virtual = delta.virtual if delta else None
    sums = []
    with _by_the_book():
        for start, end in pairwise(part.batch.starts):
            ids, targets = part.batch.tokens[start:end], part.batch.targets[start:end]
            past = 0
            if virtual is not None and virtual.embeddings is not None:
                vocab = len(base.embed)
                ids = torch.cat([torch.arange(vocab, vocab + virtual.count), ids])
            elif virtual is not None:
                past = virtual.count
            rows = torch.arange(len(ids))
            groups = [RowGroup(rows, ((delta, 1.0),))] if delta else []
            hidden = forward.hidden_states(
                base, ids, past + rows, groups, _product, _Scores(base, virtual)
            )
            scores = forward.logits(base, hidden, groups)[len(ids) - len(targets) :]
            sums.append(
                torch.nn.functional.cross_entropy(
                    scores, targets, ignore_index=IGNORED, reduction="sum"
                )
            )
    return torch.stack(sums).sum()


def _product(matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
    return x @ nf4.dequantize(matrix).to(x.dtype).T


class _Scores:
    """Attention of one sequence with its scores written out."""

    def __init__(self, base: BaseWeights, virtual: VirtualTokens | None) -> None:
        self._windows, self._virtual = base.config.sliding_windows, virtual

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        if self._virtual is not None and self._virtual.keys is not None:
            assert self._virtual.values is not None
            k = torch.cat([self._virtual.keys[layer].to(k.dtype), k])
            v = torch.cat([self._virtual.values[layer].to(v.dtype), v])
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        at = torch.arange(len(k))
        mine = at[len(k) - len(q) :, None]
        seen = at <= mine
        window = self._windows[layer]
        if window is not None:
            seen &= at > mine - window
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", shares, v).flatten(1)


def _by_the_book() -> ExitStack:
    """The decoder without the derivatives that we wrote."""

    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, None]:
        assert dtype in (None, x.dtype)
        w = autograd.wide(x)
        normed = w / (w.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return weight.to(x.dtype) * normed.to(x.dtype), None

    def rotate(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
    ) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def rotate_first(
        x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        width = 2 * cos.shape[-1] * heads
        turned = rotate(x[:, :width].reshape(len(x), heads, -1), cos, sin)
        return torch.cat([turned.flatten(1), x[:, width:]], dim=1)

    def silu_mul(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        gate, up = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up, None

    stack = ExitStack()
    for module, name, function in (
        (autograd, "rms_norm", rms_norm),
        (autograd, "rotate_first_", rotate_first),
        (autograd, "silu_mul", silu_mul),
        (rope, "rotate", rotate),
    ):
        stack.enter_context(mock.patch.object(module, name, function))
    return stack
