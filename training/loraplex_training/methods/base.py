"""The interface of methods to training: an adapter's parameters and its change of the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.weights import BaseWeights
from loraplex_model.ops.linear import BaseLinear


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters with a common learning rate: the job's times `rate` (above 1 for LoRA+'s B)."""

    names: tuple[str, ...]
    rate: float = 1.0
    decay: bool = True


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The contents of an adapter's files: PEFT's configuration, CPU tensors by their full names."""

    config: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Setting:
    """The base and the job that a method makes an adapter for.

    Attributes:
        base: weights of the base, which are never changed.
        base_model: name for `base_model_name_or_path`.
        generator: seeded with the job's seed; a method draws random numbers from nothing else.
        steps: number of optimiser steps of the job, for schedules of ranks.
        token_ids: converts text to ids without special tokens, for virtual tokens.
    """

    base: BaseWeights
    base_model: str
    generator: torch.Generator
    steps: int
    token_ids: Callable[[str], Sequence[int]]


Observe = Callable[[BaseLinear, int], None]
"""Runs a number of the job's micro-batches forward and backward over the base without adapters.

The `BaseLinear` computes the products of projections, and is the only one to see their gradients.
"""


class TrainedAdapter(Protocol):
    """An adapter in training. Not shared between jobs; on the device of the base.

    The defaults are those of an adapter that consists of its parameters alone.

    Attributes:
        parameters: leaf tensors that gradients are computed for, float32 (float64 on a float64
            base), by names that are the same in every run, in the order in which they are saved.
        dropout: dropout probability of A's inputs in training.
        settled: first step whose adapter may be the best one. Earlier ones do not have the
            requested form yet (AdaLoRA, until its ranks are within the budget). Usually 0.
    """

    parameters: Mapping[str, torch.Tensor]
    dropout: float = 0.0
    settled: int = 0

    def prepare(self, observe: Observe) -> None:
        """Chooses masks from data. Called once before the first step, not when a run is resumed."""
        return

    def groups(self) -> Sequence[ParameterGroup]:
        """Returns groups that contain every parameter once."""
        return [ParameterGroup(tuple(self.parameters))]

    def delta(self) -> AdapterDelta:
        """Computes the change of the base for one pass, differentiable in the parameters."""

    def penalty(self) -> torch.Tensor | None:
        """Returns a term added to the mean loss of a step (AdaLoRA's orthogonality), or None."""
        return None

    def stepped(self, step: int) -> None:
        """Updates budgets and masks after optimiser step `step` (from 1); gradients still exist."""
        return

    def state(self) -> Mapping[str, torch.Tensor]:
        """Returns the tensors, not copied, besides parameters that a continuation needs."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state` returned. The caller restores the parameters, in place."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def files(self) -> AdapterFiles:
        """Returns the files of the adapter as it is now."""
