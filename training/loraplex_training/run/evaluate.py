"""How good jobs are on the examples set apart: losses in joint passes, answers by generation."""

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
"""What a model says to the prompts of examples; None is the bare base."""

SHOWN = 3
"""Examples whose answers are told before and after."""


def losses(
    joint: JointPass, jobs: Sequence[Job], stopped: Callable[[], bool]
) -> list[float] | None:
    """Each job's sum of losses over all it is evaluated on; None if told to stop meanwhile."""
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
    """The share of right answers; None if the job does not ask for it, or there is no example."""
    asked = examples[: job.spec.metric_examples]
    if not job.spec.metric or not asked or answer is None:
        return None
    return score(job.spec.metric, answer(delta, asked), [sample.reference for sample in asked])


def remembered(answer: Answer) -> Answer:
    """The same, but the base is asked once for the same examples: jobs of a sweep share theirs."""
    said: dict[tuple[int, ...], Sequence[str]] = {}

    def ask(delta: AdapterDelta | None, examples: Sequence[Sample]) -> Sequence[str]:
        if delta is not None:
            return answer(delta, examples)
        key = tuple(map(id, examples))
        if key not in said:
            said[key] = answer(None, examples)
        return said[key]

    return ask


def delta(job: Job) -> AdapterDelta:
    """What the job's adapter is now, without gradients."""
    with torch.no_grad():
        return job.adapter.delta()


def answers(
    job: Job,
    delta: AdapterDelta | None,
    examples: Sequence[Sample],
    answer: Answer,
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Sampled]:
    """What it says to the first examples."""
    shown = examples[:SHOWN]
    for sample, said in zip(shown, answer(delta, shown) if shown else (), strict=True):
        prompt = decode(sample.tokens[: sample.prompt])
        yield Sampled(job.name, job.progress.step, prompt, said, sample.reference)
