"""The seam between methods and training: what is trained, and what it makes of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.weights import BaseWeights
from loraplex_model.ops.linear import BaseLinear


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate: the job's times `rate` (LoRA+: 16 for B, say)."""

    names: tuple[str, ...]
    rate: float = 1.0
    decay: bool = True


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What is saved: a PEFT configuration and its tensors, fully qualified, on the CPU."""

    config: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method is made for.

    Attributes:
        base: the base's weights, which stay as they are.
        base_model: what goes to `base_model_name_or_path`.
        generator: seeded with the job's seed; the only source of chance in a method.
        steps: optimiser steps that the job will take, for schedules of budgets.
        token_ids: text to ids, for virtual tokens that start as a text.
    """

    base: BaseWeights
    base_model: str
    generator: torch.Generator
    steps: int
    token_ids: TokenIds


class TokenIds(Protocol):
    """Text to token ids, without special tokens."""

    def __call__(self, text: str, /) -> Sequence[int]: ...


class Observe(Protocol):
    """Runs `batches` of the job's micro-batches forward and backward over the bare base, through
    this product; gradients reach nothing but what the product itself looks at."""

    def __call__(self, linear: BaseLinear, batches: int, /) -> None: ...


class TrainedAdapter(Protocol):
    """An adapter in training. Not shared between jobs; on the device of the base.

    Attributes:
        parameters: the leaves that gradients go to, float32 (float64 on a float64 base), by names
            that stay the same from run to run, in the order in which they are saved.
        dropout: the probability with which inputs of A are dropped in training.
        settled: no step before this one is the best: what it holds is not yet what was asked for
            (AdaLoRA, until its ranks are within the budget). 0 for most.
    """

    parameters: Mapping[str, torch.Tensor]
    dropout: float
    settled: int

    def prepare(self, observe: Observe) -> None:
        """Called once before the first step (not when a run goes on): masks chosen from data."""

    def groups(self) -> Sequence[ParameterGroup]:
        """Every parameter, once."""

    def delta(self) -> AdapterDelta:
        """What it changes of the base now, differentiable in the parameters. Made for each pass."""

    def penalty(self) -> torch.Tensor | None:
        """What is added to the mean loss of a step, or None (AdaLoRA's orthogonality)."""

    def stepped(self, step: int) -> None:
        """Called after optimiser step `step` (from 1), gradients still there: budgets, masks."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """What is needed beside the parameters to go on from here, to the bit."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes `state` back; parameters are restored by the caller, in place."""

    def files(self) -> AdapterFiles:
        """What would be saved now."""
