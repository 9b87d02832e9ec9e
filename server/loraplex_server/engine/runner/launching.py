"""Passes that a local decoder computes while the host does other work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.decoder.cuda.draws import DrawTable
from numpy.typing import NDArray

from loraplex_server.engine.runner.device_errors import DeviceErrors
from loraplex_server.engine.runner.protocol import DrawOrder, StepResult


class DecoderTicket(Protocol):
    """A pass that a decoder has launched."""

    def wait(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        """Waits for the pass; returns tokens [D], logits [L, vocab] and states [H, hidden]."""


@runtime_checkable
class LaunchingDecoder(Protocol):
    """A decoder that chooses tokens itself and does not wait for its passes."""

    def launch(
        self, batch: ForwardBatch, draws: DrawTable, lines: NDArray[np.int32]
    ) -> DecoderTicket:
        """Launches a pass, the choice of tokens, and the copies of both to the host."""


@dataclass(frozen=True, slots=True)
class LocalTicket:
    """A `Ticket` of a local decoder."""

    under_way: DecoderTicket
    errors: DeviceErrors

    def wait(self) -> StepResult:
        """Waits for this launch alone, not for those that follow. Raises `DeviceLost`."""
        return StepResult(*self.errors.replace(self.under_way.wait))


@dataclass(frozen=True, slots=True)
class Launcher:
    """The method `launch` of an `AheadRunner`, for one decoder.

    Attributes:
        mapped: a context for reading the decoder's weights.
    """

    decoder: LaunchingDecoder
    errors: DeviceErrors
    mapped: Callable[[], AbstractContextManager[None]]

    def __call__(
        self,
        batch: ForwardBatch,
        draws: Sequence[DrawOrder],
        draw_lines: NDArray[np.int32],
        host_lines: NDArray[np.int32],
    ) -> LocalTicket:
        """Starts a forward pass and the choice of tokens; see `AheadRunner.launch`."""
        table = DrawTable.of(draws, draw_lines)
        with self.mapped(), torch.inference_mode():
            ticket = self.errors.replace(lambda: self.decoder.launch(batch, table, host_lines))
        return LocalTicket(ticket, self.errors)
