"""Cross-entropy of learned tokens without a matrix of [tokens, vocabulary].

Logits exist for a few hundred rows at a time. Their gradient (softmax minus one at the target,
times the head) is computed at once, in the forward pass, so the backward pass needs only a gradient
of the size of the hidden states. The chunked losses of Liger (arXiv 2410.10989) and of Wijmans et
al. (arXiv 2411.09009) work in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from loraplex_model.adapters.delta import AdapterDelta, RowsDelta
from loraplex_model.adapters.mix import RowGroup
from loraplex_model.base.config import MODEL, DecoderConfig
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import forward
from loraplex_model.ops import elementwise, products

_CHUNK_BYTES = 100 << 20  # of logits; less is slower, since every chunk reads the whole head
_MOST_ROWS = 512
_HEAD = (MODEL, "lm_head")


def chunk_rows(vocab: int, itemsize: int = 4) -> int:
    """Returns the number of rows whose logits exist at a time."""
    return max(16, min(_MOST_ROWS, _CHUNK_BYTES // (vocab * itemsize) // 16 * 16))


def token_losses(base: BaseWeights, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy [R], in nats, of normed states [R, hidden] under the base head.

    Differentiable in `hidden`. A row's loss and gradient depend on that row only.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    result: torch.Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        hidden, targets, base, wanted
    )
    return result


def changes_head(delta: AdapterDelta | None) -> bool:
    """Returns whether an adapter changes the head, so that `summed_loss` is needed."""
    return delta is not None and _HEAD in delta.sites


def summed_loss(
    base: BaseWeights, delta: AdapterDelta, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Returns the sum of the rows' cross-entropies under the head with the change in `delta`.

    Differentiable in `hidden` and in the tensors of the head's change.
    """
    change = delta.at(_HEAD, RowsDelta)
    assert change is not None
    wanted = torch.is_grad_enabled()
    result: torch.Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, targets, base, change, wanted, change.a, change.b, change.rows
    )
    return result


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, base: BaseWeights, wanted: bool
    ) -> torch.Tensor:
        rows, vocab = len(hidden), len(base.lm_head)
        ctx.dtype = hidden.dtype
        head, config = base.lm_head.to(hidden.dtype), base.config
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(rows, dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        step = chunk_rows(vocab, wide.itemsize)
        if _in_kernels(hidden, head, config):
            ctx.save_for_backward(_in_chunks(hidden, targets, head, step, losses, wanted))
            return losses
        buffer = torch.empty(min(step, rows), vocab, dtype=hidden.dtype, device=hidden.device)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            h, target = hidden[chunk], targets[chunk, None]
            scores = torch.mm(h, head.T, out=buffer[: len(h)])
            slope = _finish(scores, config)
            largest = scores.amax(-1, keepdim=True).to(wide)
            right = scores.gather(1, target).to(wide)
            if gradient is None:
                losses[chunk] = scores.to(wide).logsumexp(-1) - right[:, 0]
                continue
            # In place if the dtypes are equal: new memory costs more than the arithmetic.
            into = scores if scores.dtype == wide else None
            shares = torch.softmax(scores, -1, dtype=wide, out=into)
            # The largest share is exp(0) / sum, which gives the logarithm of the sum.
            losses[chunk] = (largest - shares.amax(-1, keepdim=True).log() - right)[:, 0]
            shares.scatter_add_(1, target, torch.full_like(right, -1.0))
            if slope is not None:
                shares.mul_(slope)
            torch.mm(shares.to(head.dtype), head, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        slope = gradient * grads[0][:, None].to(gradient.dtype)
        return slope.to(ctx.dtype), None, None, None


def _in_kernels(hidden: torch.Tensor, head: torch.Tensor, config: DecoderConfig) -> bool:
    """Whether the kernels for bfloat16 products on the CPU compute the loss."""
    narrow = hidden.dtype == head.dtype == torch.bfloat16 and not hidden.is_cuda
    plain = config.logit_scale == 1 and not config.logit_softcap
    return narrow and plain and head.is_contiguous() and products.available()


def _in_chunks(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: torch.Tensor,
    step: int,
    losses: torch.Tensor,
    wanted: bool,
) -> torch.Tensor | None:
    """Writes the losses; returns their gradient by `hidden`, float32, if it is wanted."""
    gradient = torch.zeros(hidden.shape) if wanted else None
    buffer = torch.empty(min(step, len(hidden)), len(head), dtype=torch.bfloat16)
    for start in range(0, len(hidden), step):
        chunk = slice(start, min(start + step, len(hidden)))
        h = hidden[chunk].contiguous()
        scores = buffer[: len(h)]
        products.head(head, h, scores)
        losses[chunk] = elementwise.cross_entropy(scores, targets[chunk].contiguous(), slope=wanted)
        if gradient is not None:
            products.head_gradient(head, scores, gradient[chunk])
    return gradient


def _finish(scores: torch.Tensor, config: DecoderConfig) -> torch.Tensor | float | None:
    """Scales and caps scores in place, as `forward.logits` does.

    Returns the derivative of the result with respect to the scores; None if it is 1.
    """
    scale, cap = config.logit_scale, config.logit_softcap
    if scale != 1:
        scores.mul_(scale)
    if not cap:
        return scale if scale != 1 else None
    scores.div_(cap).tanh_()
    slope = scores.square().neg_().add_(1).mul_(scale)
    scores.mul_(cap)
    return slope


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        base: BaseWeights,
        change: RowsDelta,
        wanted: bool,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        wanted = wanted and any(ctx.needs_input_grad)
        leaves = [None if t is None else t.detach().requires_grad_(wanted) for t in tensors]
        a, b, rows = leaves
        own = replace(change, a=a, b=b, rows=rows)
        delta = AdapterDelta({_HEAD: own})
        found = [leaf for leaf in leaves if leaf is not None]
        sums = [torch.zeros_like(leaf) for leaf in found]
        parts = []
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        total = total.to(hidden.device)
        step = chunk_rows(len(base.lm_head), total.dtype.itemsize)
        for h, target in zip(torch.split(hidden, step), torch.split(targets, step), strict=True):
            leaf = h.detach().requires_grad_(wanted)
            group = RowGroup(torch.arange(len(h), device=h.device), ((delta, 1.0),))
            with torch.set_grad_enabled(wanted):
                scores = forward.logits(base, leaf, [group])
                loss = torch.nn.functional.cross_entropy(scores, target, reduction="sum")
            total += loss.detach()
            if wanted:
                own_gradient, *gradients = torch.autograd.grad(loss, [leaf, *found])
                parts.append(own_gradient)
                for into, gradient in zip(sums, gradients, strict=True):
                    into.add_(gradient)
        if wanted:
            ctx.save_for_backward(torch.cat(parts), *sums)
        ctx.present = [t is not None for t in tensors]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_hidden, *rest = (g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        left = iter(rest)
        to_tensors = [next(left) if present else None for present in ctx.present]
        return (to_hidden, None, None, None, None, *to_tensors)


def of_parts(
    base: BaseWeights,
    hidden: torch.Tensor,
    deltas: Sequence[AdapterDelta | None],
    learned: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Returns the sum of each part's token losses; `learned` has its rows of `hidden`.

    Parts under the unchanged base head share chunks.
    """
    plain = [i for i, delta in enumerate(deltas) if not changes_head(delta)]
    sums: dict[int, torch.Tensor] = {}
    if plain:
        rows = torch.cat([learned[i] for i in plain])
        losses = token_losses(base, hidden[rows], torch.cat([targets[i] for i in plain]))
        parts = torch.split(losses, [len(learned[i]) for i in plain])
        sums = {i: part.sum() for i, part in zip(plain, parts, strict=True)}
    for i, delta in enumerate(deltas):
        if delta is not None and i not in sums:
            sums[i] = summed_loss(base, delta, hidden[learned[i]], targets[i])
    return [sums[i] for i in range(len(deltas))]
