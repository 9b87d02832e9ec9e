"""One pass over the base model for the micro-batches of several jobs, with their gradients.

The rows of all jobs are side by side. Products with the base weights cover all rows; each job's
adapter acts on its own rows, through the decoder that serves it. Rows never mix. So up to rounding
a job's loss and gradient are the same as alone, and values that are not finite stay in their job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from loraplex_model.adapters.delta import AdapterDelta, VirtualTokens
from loraplex_model.adapters.mix import Dropout, RowGroup
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import forward
from loraplex_model.decoder.attention import PackedAttention
from loraplex_model.ops import unpack
from loraplex_model.ops.linear import BaseLinear, FusedLinear, ScratchLinear

from loraplex_training.data.samples import IGNORED, MicroBatch
from loraplex_training.methods.base import TrainedAdapter
from loraplex_training.step import loss


@dataclass(frozen=True, slots=True)
class Part:
    """One job's share of a pass.

    Attributes:
        adapter: the job's adapter; None is the plain base model.
        weight: factor on the sum of token losses in the differentiated total. With one over the
            learned tokens of the optimiser step, all tokens of the step have equal weight.
        dropout: generator for dropout; None drops nothing.
    """

    adapter: TrainedAdapter | None
    batch: MicroBatch
    weight: float = 1.0
    dropout: torch.Generator | None = None


@dataclass
class _Rows:
    """All parts side by side; rows of virtual tokens precede those of each example.

    `learned` has, for each part, the rows whose next token is learned; `targets` has those tokens.
    """

    starts: list[int]
    virtual: list[VirtualTokens | None]
    groups: list[RowGroup]
    learned: list[torch.Tensor]
    targets: list[torch.Tensor]
    tokens: torch.Tensor = field(init=False)
    positions: torch.Tensor = field(init=False)


class JointPass:
    """Computes losses and gradients over one base model."""

    def __init__(
        self,
        base: BaseWeights,
        linear: BaseLinear | None = None,
        checkpointing: bool = False,
        products: torch.dtype | None = None,
    ) -> None:
        """`checkpointing` recomputes each MLP in the backward pass to save memory.

        `products` is the type of what matrix products read and give, None that of all other states.
        """
        self._base = base
        on_cuda = base.embed.is_cuda
        self._linear = linear or (FusedLinear() if on_cuda else ScratchLinear(unpack.kernel()))
        self._checkpointing = checkpointing
        self._products = products

    def backward(self, parts: Sequence[Part], linear: BaseLinear | None = None) -> list[float]:
        """Adds each part's gradient to its adapter's parameters (`.grad`).

        Returns each part's unweighted sum of token losses (cross-entropy, nats), without penalties.
        If a part's sum is not finite, neither are its gradients; other parts are not affected. A
        `linear` that is given multiplies in the type of all other states.
        """
        with torch.enable_grad():
            products = self._products if linear is None else None
            sums = self._sums(parts, linear or self._linear, self._checkpointing, products)
            total = torch.stack([s * p.weight for s, p in zip(sums, parts, strict=True)]).sum()
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
        return [float(s.detach()) for s in sums]

    def losses(self, parts: Sequence[Part]) -> list[float]:
        """Returns the sums of `backward` without computing gradients, and without dropout."""
        plain = [replace(part, dropout=None) for part in parts]
        with torch.no_grad():
            sums = self._sums(plain, self._linear, products=self._products)
            return [float(s) for s in sums]

    def logits(self, delta: AdapterDelta | None, tokens: Sequence[int]) -> torch.Tensor:
        """Returns the logits of one sequence, float32 [T, vocab]. None is the plain base model.

        The products are not those of `products`, so that the result can be compared with the
        server's closely.
        """
        ids = torch.tensor(tokens)
        batch = MicroBatch(ids, (0, len(ids)), torch.zeros_like(ids))
        with torch.no_grad():
            rows = self._lay_out([(delta, batch, None)])
            hidden = self._hidden(rows, self._linear)[rows.learned[0]]
            return forward.logits(self._base, hidden, _group(delta, len(ids)))

    def _sums(
        self,
        parts: Sequence[Part],
        linear: BaseLinear,
        checkpointing: bool = False,
        products: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        deltas = [part.adapter.delta() if part.adapter else None for part in parts]
        joined = self._base.config.joined
        rows = self._lay_out(
            [(d, p.batch, _dropout(p, joined)) for d, p in zip(deltas, parts, strict=True)]
        )
        hidden = self._hidden(rows, linear, checkpointing, products)
        return loss.of_parts(self._base, hidden, deltas, rows.learned, rows.targets)

    def _hidden(
        self,
        rows: _Rows,
        linear: BaseLinear,
        checkpointing: bool = False,
        products: torch.dtype | None = None,
    ) -> torch.Tensor:
        attention = PackedAttention(self._base.config, rows.starts, rows.virtual)
        return forward.hidden_states(
            self._base,
            rows.tokens,
            rows.positions,
            rows.groups,
            linear,
            attention,
            checkpointing,
            _is_long(rows, self._base.config),
            products,
        )

    def _lay_out(
        self, parts: Sequence[tuple[AdapterDelta | None, MicroBatch, Dropout | None]]
    ) -> _Rows:
        device = self._base.embed.device
        vocab = len(self._base.embed)
        tokens: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        rows = _Rows([0], [], [], [], [])
        for delta, batch, dropout in parts:
            first, learned = rows.starts[-1], []
            virtual = delta.virtual if delta else None
            embedded = virtual.count if virtual and virtual.embeddings is not None else 0
            past = virtual.count if virtual and virtual.keys is not None else 0
            for start, end in pairwise(batch.starts):
                length = embedded + end - start
                tokens += [torch.arange(vocab, vocab + embedded), batch.tokens[start:end]]
                positions.append(torch.arange(past, past + length))
                own = (batch.targets[start:end] != IGNORED).nonzero()[:, 0]
                learned.append(rows.starts[-1] + embedded + own)
                rows.starts.append(rows.starts[-1] + length)
                rows.virtual.append(virtual)
            if delta is not None:
                span = slice(first, rows.starts[-1])
                mine = torch.arange(span.start, span.stop, device=device)
                group = RowGroup(mine, ((delta, 1.0),), span=span, dropout=dropout)
                rows.groups.append(group)
            rows.learned.append(torch.cat(learned).to(device))
            rows.targets.append(batch.targets[batch.targets != IGNORED].to(device))
        rows.tokens, rows.positions = torch.cat(tokens).to(device), torch.cat(positions).to(device)
        return rows


def _is_long(rows: _Rows, config: DecoderConfig) -> torch.Tensor | None:
    """Whether each token is of a sequence with LongRoPE's second frequencies; None if none is."""
    counts = torch.tensor(rows.starts, device=rows.tokens.device).diff()
    if config.long_rope is None:
        return None
    return torch.repeat_interleave(counts > config.short_positions, counts)


def _group(delta: AdapterDelta | None, rows: int) -> list[RowGroup]:
    return [] if delta is None else [RowGroup(torch.arange(rows), ((delta, 1.0),))]


def _dropout(part: Part, joined: tuple[str, ...]) -> Dropout | None:
    """Returns the part's dropout in this pass; draws one number from its generator."""
    if part.adapter is None or part.dropout is None or part.adapter.dropout == 0:
        return None
    seed = torch.randint(1 << 62, (), generator=part.dropout, device=part.dropout.device)
    return Dropout(part.adapter.dropout, int(seed), joined)
