"""Evaluates jobs on their evaluation examples: losses in joint passes, answers by generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from loraplex_model.adapters.delta import AdapterDelta

from loraplex_training.data.samples import Sample
from loraplex_training.report.events import Sampled
from loraplex_training.spec.metric import score
from loraplex_training.step.job import Job
from loraplex_training.step.joint import JointPass, Part

Answer = Callable[[AdapterDelta | None, Sequence[Sample]], Sequence[str]]
"""Generates the answers to the prompts of examples. The adapter None is the plain base model."""

SHOWN = 3
"""Number of examples whose answers are reported before and after training."""


def losses(
    joint: JointPass, jobs: Sequence[Job], stopped: Callable[[], bool]
) -> list[float] | None:
    """Returns each job's sum of token losses over its evaluation examples; None if stopped."""
    sums = [0.0] * len(jobs)
    for number in range(max((len(job.evaluation) for job in jobs), default=0)):
        if stopped():
            return None
        taking = [i for i, job in enumerate(jobs) if number < len(job.evaluation)]
        found = joint.losses([Part(jobs[i].adapter, jobs[i].evaluation[number]) for i in taking])
        for i, loss in zip(taking, found, strict=True):
            sums[i] += loss
    return sums


def metric(
    job: Job, delta: AdapterDelta | None, examples: Sequence[Sample], answer: Answer | None
) -> float | None:
    """Returns the share of correct answers; None without a metric, examples or `answer`."""
    asked = examples[: job.spec.metric_examples]
    if not job.spec.metric or not asked or answer is None:
        return None
    return score(job.spec.metric, answer(delta, asked), [sample.reference for sample in asked])


def remembered(answer: Answer) -> Answer:
    """Returns `answer` with the base model's answers cached, since the jobs of a sweep share them.

    The cache is keyed by the examples' identities, so it must not outlive them.
    """
    cached: dict[tuple[int, ...], Sequence[str]] = {}

    def ask(delta: AdapterDelta | None, examples: Sequence[Sample]) -> Sequence[str]:
        if delta is not None:
            return answer(delta, examples)
        key = tuple(map(id, examples))
        if key not in cached:
            cached[key] = answer(None, examples)
        return cached[key]

    return ask


def delta(job: Job) -> AdapterDelta:
    """Returns the job's current adapter, without gradients."""
    with torch.no_grad():
        return job.adapter.delta()


def answers(
    job: Job,
    delta: AdapterDelta | None,
    examples: Sequence[Sample],
    answer: Answer,
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Sampled]:
    """Yields the answers to the first examples, as events."""
    shown = examples[:SHOWN]
    for sample, text in zip(shown, answer(delta, shown) if shown else (), strict=True):
        prompt = decode(sample.tokens[: sample.prompt])
        yield Sampled(job.name, job.progress.step, prompt, text, sample.reference)
