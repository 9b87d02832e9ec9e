"""Parts of a layer whose derivative computes them again instead of keeping what they computed.

See Chen et al., arXiv 1604.06174. The graph of derivatives is that of the first computation and
only the tensors in it are computed again, so gradients have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint


class Checkpointed:
    """Calls parts of a layer. If enabled, their inputs alone are kept until the backward pass.

    Attributes:
        recomputes: whether a part is being computed again; nobody reads its result then.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled, self.recomputes = enabled, False

    def __call__(self, part: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """The part's result."""
        if not (self._enabled and torch.is_grad_enabled()):
            return part(*inputs)
        # Dropout makes its masks from seeds of its own, so there is no state to preserve.
        result: torch.Tensor = checkpoint(
            part,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self._recomputing()),
        )
        return result

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        self.recomputes = True
        try:
            yield
        finally:
            self.recomputes = False


def unread(width: int, x: torch.Tensor) -> torch.Tensor:
    """Stands for a product [T, width] of x [T, in] that is computed again but not read."""
    return x.new_zeros(len(x), width)
