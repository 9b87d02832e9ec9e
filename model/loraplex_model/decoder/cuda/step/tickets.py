"""The results of a pass that are copied to the host, and the wait for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.decoder.cuda.step.staging import Transfers


@dataclass(frozen=True, slots=True)
class HostRoom:
    """Pinned memory for the results of one pass.

    It is taken before the pass is launched: if there is none left, nothing has been computed, and
    the tokens that the pass before chose have not been overwritten.

    Attributes:
        tokens: int32 [D].
        lines: float32 [L, vocab].
        states: float32 [H, hidden].
    """

    tokens: torch.Tensor
    lines: torch.Tensor
    states: torch.Tensor

    @staticmethod
    def of(
        draws: int, lines: tuple[int, int], states: tuple[int, int], device: torch.device
    ) -> HostRoom:
        """Room for so many tokens, and lines and states of these shapes.

        It is pinned if `device` is a CUDA device.
        """
        pin = device.type == "cuda"
        return HostRoom(
            torch.empty(draws, dtype=torch.int32, pin_memory=pin),
            torch.empty(lines, pin_memory=pin),
            torch.empty(states, pin_memory=pin),
        )


@dataclass(frozen=True, slots=True)
class PassTicket:
    """Results that are on their way to the host, in pinned memory of their own.

    Attributes:
        tokens: int32 [D].
        lines: float32 [L, vocab].
        states: float32 [H, hidden].
        ended: the event after the copies; None on the CPU.
    """

    tokens: torch.Tensor
    lines: torch.Tensor
    states: torch.Tensor
    ended: torch.cuda.Event | None
    transfers: Transfers

    @staticmethod
    def of(
        tokens: torch.Tensor,
        lines: torch.Tensor,
        states: torch.Tensor,
        room: HostRoom,
        transfers: Transfers,
    ) -> PassTicket:
        """Starts the copies of tokens, lines and states, of the shapes above, to `room`."""
        targets = (room.tokens, room.lines, room.states)
        for source, target in zip((tokens, lines, states), targets, strict=True):
            if source.numel():
                transfers.copy_out(target, source)
        return PassTicket(*targets, transfers.mark(tokens.device), transfers)

    def wait(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        """Waits for the pass and returns tokens, lines and states."""
        self.transfers.wait(self.ended)
        return self.tokens.numpy(), self.lines.numpy(), self.states.numpy()
