"""Many adapters trained together on one base: a sweep computes one joint pass per step.

Uses the trainer's own parts without its files: methods, `JointPass`, torch's AdamW. All jobs with
the same seed get the same examples in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.weights import BaseWeights
from loraplex_model.ops.linear import DenseLinear
from loraplex_training import methods
from loraplex_training.data.samples import MicroBatch
from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.spec.spec import MethodSpec
from loraplex_training.step.joint import JointPass, Part
from paper import small_model

SEQUENCES, LENGTH = 4, 64
EVALUATED = 128


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter of a sweep; `options` are those of its method."""

    name: str
    options: Mapping[str, object]
    method: str = "lora"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """Settings of all jobs of a pass: AdamW, with `rate` falling linearly from the first step."""

    base: BaseWeights
    text: small_model.Text
    steps: int
    rate: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished job, with its loss in nats on held-out text."""

    job: Job
    adapter: TrainedAdapter
    parameters: int
    loss: float


@dataclass(slots=True)
class _Running:
    job: Job
    adapter: TrainedAdapter
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        adapter = self.adapter
        groups = [
            {"params": [adapter.parameters[name] for name in group.names], "rate": group.rate}
            for group in adapter.groups()
        ]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)

    def step(self, number: int, rate: float) -> None:
        """After the pass: what the method adds to the loss, then AdamW, then what follows it."""
        penalty = self.adapter.penalty()
        if penalty is not None:
            penalty.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["rate"]
        self.optimiser.step()
        self.adapter.stepped(number)
        self.optimiser.zero_grad()


def train(sweep: Sweep, jobs: Sequence[Job]) -> list[Trained]:
    """Trains all jobs in the same passes."""
    joint = JointPass(sweep.base, DenseLinear())
    running = [_Running(job, _make(sweep, job)) for job in jobs]
    for number in range(1, sweep.steps + 1):
        batches = {job.seed: _examples(sweep, job.seed, number) for job in jobs}
        parts = [
            Part(one.adapter, batches[one.job.seed], 1 / batches[one.job.seed].learned)
            for one in running
        ]
        joint.backward(parts)
        for one in running:
            one.step(number, sweep.rate * (1 - (number - 1) / sweep.steps))
    return [
        Trained(
            one.job,
            one.adapter,
            sum(p.numel() for p in one.adapter.parameters.values()),
            loss_of(sweep, one.adapter.delta()),
        )
        for one in running
    ]


def loss_of(
    sweep: Sweep, change: AdapterDelta | None, pieces: int = EVALUATED, seed: int = 0
) -> float:
    """Mean loss in nats per byte on held-out text, of the base with a change or without (None)."""
    joint = JointPass(sweep.base, DenseLinear())
    adapter = None if change is None else cast(TrainedAdapter, _Fixed(change))
    chosen = small_model.windows(sweep.text.evaluation, pieces, small_model.CONTEXT, seed)
    total = learned = 0.0
    for some in chosen.split(32):
        batch = small_model.micro_batch(some)
        total += joint.losses([Part(adapter, batch)])[0]
        learned += batch.learned
    return total / learned


@dataclass(frozen=True, slots=True)
class _Fixed:
    """The part of an adapter's interface that a pass without gradients uses."""

    change: AdapterDelta
    dropout: float = 0.0
    settled: int = 0

    def delta(self) -> AdapterDelta:
        return self.change


def _make(sweep: Sweep, job: Job) -> TrainedAdapter:
    chance = torch.Generator().manual_seed(job.seed)
    setting = Setting(sweep.base, "paper", chance, sweep.steps, lambda text: list(text.encode()))
    return methods.make(MethodSpec(job.method, job.options), setting)


def _examples(sweep: Sweep, seed: int, step: int) -> MicroBatch:
    seed = 1_000_000 * (seed + 1) + step
    return small_model.micro_batch(small_model.windows(sweep.text.train, SEQUENCES, LENGTH, seed))
