"""One adapter in training: its steps, its evaluations and its end.

The order of a step:

    1. gradients of (sum of token losses) / (learned tokens of the step), from `JointPass`, over the
       step's micro-batches; then the gradient of the method's penalty, once
    2. their norm; if it or the loss is not finite, the job ends and no parameter changes
    3. clipping by the job's own norm, the optimiser, the schedule
    4. the method's `stepped`, while the gradients still exist; then they are freed

Evaluations take place before the first step, after every `eval_every`-th and after the last. The
parameters with the lowest loss after a step are kept and restored at the end. Steps at which a
method has not yet reached its final form (`TrainedAdapter.settled`) do not count, and do not stop
the job early.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from loraplex_training.data import Batches
from loraplex_training.data.samples import MicroBatch
from loraplex_training.methods.base import TrainedAdapter
from loraplex_training.report.events import Evaluated, Event, JobEnded, JobStatus, StepDone
from loraplex_training.spec.spec import JobSpec
from loraplex_training.step.divergence import DivergenceWatch
from loraplex_training.step.joint import Part
from loraplex_training.step.optimiser import JobOptimiser, expected

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """The passes of an optimiser step, one part per micro-batch, and its numbers of tokens."""

    parts: Sequence[Part]
    tokens: int
    learned: int


@dataclass(frozen=True, slots=True)
class TrainingState:
    """State of a job, without tensors and the optimiser's state.

    Attributes:
        step: number of optimiser steps taken.
        reason: a sentence on why the job ended, or "".
        first_loss: evaluation loss before the first step; None without evaluation.
        best_step: step of the best evaluation; 0 if there is none yet.
        best_loss: loss of the best evaluation, or of the last training step if nothing is
            evaluated; infinite if there is none yet.
        first_metric: share of correct answers before the first step; None without a metric.
        best_metric: share of correct answers at the best evaluation; None without a metric.
        evaluated: step of the last evaluation.
        waited: number of evaluations since the best one.
        tokens: number of tokens trained on.
    """

    state: JobStatus = JobStatus.TRAINING
    step: int = 0
    reason: str = ""
    first_loss: float | None = None
    best_step: int = 0
    best_loss: float = math.inf
    first_metric: float | None = None
    best_metric: float | None = None
    evaluated: int = 0
    waited: int = 0
    tokens: int = 0


class Job:
    """One job of a run. It has its own adapter and does not depend on other jobs.

    Attributes:
        progress: current state; a change replaces the value.
    """

    def __init__(
        self,
        spec: JobSpec,
        adapter: TrainedAdapter,
        batches: Batches,
        evaluation: Sequence[MicroBatch],
        generator: torch.Generator,
    ) -> None:
        """`generator` is the one that initialised the adapter."""
        self.spec: Final = spec
        self.adapter: Final = adapter
        self.batches: Final = batches
        self.evaluation: Final = evaluation
        self.progress = TrainingState()
        self._generator = generator
        self._optimiser: JobOptimiser | None = JobOptimiser(
            spec.optim, adapter.parameters, adapter.groups(), batches.steps
        )
        self._watch = DivergenceWatch()
        self._best: dict[str, torch.Tensor] | None = None
        self._device = next(iter(adapter.parameters.values())).device

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.adapter.parameters.values())

    @property
    def optimiser(self) -> str:
        """The state that the optimiser will keep ("AdamW, float32, 1.2 MB")."""
        return str(expected(self.spec.optim, self.adapter.parameters, self.adapter.groups()))

    @property
    def active(self) -> bool:
        """Whether the job still trains."""
        return self.progress.state is JobStatus.TRAINING

    @property
    def due(self) -> bool:
        """Whether the job is to be evaluated now, after a step."""
        done = self.progress.step
        if not self.active or not self.evaluation or done == self.progress.evaluated:
            return False
        if done == self.batches.steps:
            return True
        if self.spec.eval_every:
            return done % self.spec.eval_every == 0
        return self.batches.epoch(done) != self.batches.epoch(done - 1)

    def begin(self) -> Step:
        """Returns the next step."""
        batches = self.batches.step(self.progress.step)
        learned = sum(batch.learned for batch in batches)
        return Step(
            [
                Part(self.adapter, batch, 1 / max(1, learned), self._dropout(number))
                for number, batch in enumerate(batches)
            ],
            sum(len(batch.tokens) for batch in batches),
            learned,
        )

    def end(self, step: Step, loss_sum: float, seconds: float) -> Iterator[Event]:
        """Applies the optimiser step; gradients are already accumulated.

        `loss_sum` is the sum over the step's learned tokens; `seconds` the duration of its passes.
        """
        optimiser = self._optimiser
        assert optimiser is not None
        loss = loss_sum / max(1, step.learned)
        number = self.progress.step + 1
        penalty = self.adapter.penalty() if math.isfinite(loss) else None
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        norm = optimiser.norm()
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"loss of step {number} is {loss}" if not math.isfinite(loss) else (
                f"gradient of step {number} is not finite"
            )  # fmt: skip
            yield self.leave(JobStatus.DIVERGED, f"the {what}; lower lr")
            return
        rate = optimiser.rate
        optimiser.clip(norm)
        optimiser.step()
        self.adapter.stepped(number)
        optimiser.clear()
        self._set(step=number, tokens=self.progress.tokens + step.tokens)
        yield StepDone(
            self.name, number, loss, rate, norm, step.tokens, step.learned, seconds
        )  # fmt: skip
        reason = self._watch.trained(loss)
        if reason:
            yield self.leave(JobStatus.DIVERGED, reason)
        elif number == self.batches.steps and not self.evaluation:
            self._set(best_step=number, best_loss=loss)
            yield self.leave(JobStatus.FINISHED, f"all {number} steps are done")

    def evaluate(self, loss_sum: float, metric: float | None) -> Iterator[Event]:
        """Records an evaluation: the sum of losses over its learned tokens, and the metric."""
        now = self.progress.step
        self._set(evaluated=now)
        loss = loss_sum / max(1, sum(batch.learned for batch in self.evaluation))
        if now == 0:
            self._set(first_loss=loss, first_metric=metric)
        finite = math.isfinite(loss)
        reason = self._watch.evaluated(loss) if finite else f"the evaluation loss is {loss}"
        counts = now > 0 and now >= self.adapter.settled
        sound = counts and finite and loss <= self._watch.limit
        best = sound and loss < self.progress.best_loss
        if best:
            self._set(best_step=now, best_loss=loss, best_metric=metric, waited=0)
            self._best = self._snapshot()
        elif counts:
            self._set(waited=self.progress.waited + 1)
        perplexity = math.exp(min(loss, 700.0)) if finite else math.inf
        yield Evaluated(self.name, now, loss, perplexity, metric, best)
        if self._optimiser is not None and now > 0 and finite:
            self._optimiser.evaluated(loss)
        patience = self.spec.patience
        if reason:
            yield self.leave(JobStatus.DIVERGED, reason)
        elif now == self.batches.steps:
            yield self.leave(JobStatus.FINISHED, self._summary(now))
        elif patience and self.progress.waited >= patience:
            yield self.leave(
                JobStatus.STOPPED_EARLY,
                f"the evaluation loss has not fallen below {self.progress.best_loss:.4g}, that of "
                f"step {self.progress.best_step}, in {patience} evaluations",
            )

    def _summary(self, steps: int) -> str:
        first, best = self.progress.first_loss, self.progress.best_loss
        if first is not None and best >= first:
            return (
                f"all {steps} steps are done, but no evaluation loss was below the initial "
                f"{first:.4g}; lower lr, or check the data"
            )
        return f"all {steps} steps are done"

    def leave(self, state: JobStatus, reason: str) -> JobEnded:
        """Ends the job: restores its best parameters and frees the optimiser's memory."""
        if self._optimiser is not None:
            self._optimiser.clear()
            self._optimiser = None
        if self._best is not None:
            self._put_back(self._best)
            self._best = None
        self._set(state=state, reason=reason)
        return JobEnded(self.name, state, self.progress.step, reason)

    def keep_start(self) -> None:
        """Keeps the initial parameters, which are restored if no later evaluation counts."""
        if self.evaluation:
            self._best = self._snapshot()

    def save(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns the job's whole state as JSON values and tensors, without options and data."""
        values: dict[str, Any] = asdict(self.progress) | {"state": self.progress.state.value}
        values["watch"] = asdict(self._watch)
        tensors = self._live()
        tensors["generator"] = self._generator.get_state()
        if self._optimiser is not None:
            values["optimiser"], state = self._optimiser.state()
            tensors |= {f"optimiser/{name}": tensor for name, tensor in state.items()}
        if self._best is not None:
            tensors |= {f"best/{name}": tensor for name, tensor in self._best.items()}
        return values, tensors

    def load(self, values: Mapping[str, Any], tensors: Tensors) -> None:
        """Restores what `save` returned into a new job."""
        values = dict(values)
        optimiser, watch = values.pop("optimiser", None), values.pop("watch")
        self.progress = TrainingState(**values | {"state": JobStatus(values["state"])})
        self._watch = DivergenceWatch(**watch)
        self._put_back(tensors)
        self._generator.set_state(tensors["generator"].clone())
        if optimiser is None:
            self._optimiser = None
        else:
            assert self._optimiser is not None
            self._optimiser.restore(optimiser, _below("optimiser/", tensors))
        best = _below("best/", tensors)
        self._best = {k: t.to(self._device, copy=True) for k, t in best.items()} or None

    def abandon(self) -> None:
        """Discards the gradients of an unfinished step."""
        if self._optimiser is not None:
            self._optimiser.clear()

    def _live(self) -> dict[str, torch.Tensor]:
        """Returns the current parameters and the method's state, without copying."""
        parameters = {f"parameter/{k}": p.detach() for k, p in self.adapter.parameters.items()}
        return parameters | {f"state/{name}": t for name, t in self.adapter.state().items()}

    def _snapshot(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._live().items()}

    def _put_back(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self.adapter.parameters.items():
                parameter.copy_(tensors[f"parameter/{name}"])
        self.adapter.restore(
            {k: t.to(self._device, copy=True) for k, t in _below("state/", tensors).items()}
        )

    def _dropout(self, number: int) -> torch.Generator | None:
        """Returns the generator for a micro-batch of the next step.

        Its seed depends on the job's seed, the step and the micro-batch's number only.
        """
        if not self.adapter.dropout:
            return None
        text = f"{self.spec.seed}/{self.progress.step}/{number}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return torch.Generator(self._device).manual_seed(seed >> 1)

    def _set(self, **changes: Any) -> None:
        self.progress = replace(self.progress, **changes)


def _below(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
