"""The results of a pass that are copied to the host, and the wait for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.decoder.cuda.step.staging import Transfers


@dataclass(frozen=True, slots=True)
class PassTicket:
    """Results that are on their way to the host, in pinned memory of their own.

    Attributes:
        tokens: int32 [D].
        lines: float32 [L, vocab].
        ended: the event after the copies; None on the CPU.
    """

    tokens: torch.Tensor
    lines: torch.Tensor
    ended: torch.cuda.Event | None
    transfers: Transfers

    @staticmethod
    def of(tokens: torch.Tensor, lines: torch.Tensor, transfers: Transfers) -> PassTicket:
        """Starts the copies of tokens, int32 [D], and lines, float32 [L, vocab]."""
        found = [_copy(tensor, transfers) for tensor in (tokens, lines)]
        return PassTicket(found[0], found[1], transfers.mark(tokens.device), transfers)

    def wait(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Waits for the pass and returns tokens and lines."""
        self.transfers.wait(self.ended)
        return self.tokens.numpy(), self.lines.numpy()


def _copy(source: torch.Tensor, transfers: Transfers) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    if source.numel():
        transfers.copy_out(target, source)
    return target
