"""Lays examples out into optimiser steps: a pure function of the examples, the job and the step.

A resumed run therefore takes the same steps as an uninterrupted one, with no state to save.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from typing import Final

from loraplex_model.base.refusal import Problem, Reason

from loraplex_training.data.samples import MicroBatch, Sample
from loraplex_training.spec.fields import refusal
from loraplex_training.spec.parse import problems_of
from loraplex_training.spec.spec import JobSpec

OPEN: Final = 64
"""Number of open micro-batches that first-fit considers. Older ones are closed."""


class Batches:
    """The steps of a job.

    Each epoch takes every example once, in an order drawn from the seed and the epoch. A
    micro-batch has `batch_size` examples or, with `pack`, as many as first-fit packs into
    `max_tokens` tokens. A step has `accumulation` micro-batches; the last step of an epoch may have
    fewer.

    Attributes:
        steps: number of optimiser steps: `job.steps`, or the steps of its epochs.
    """

    def __init__(self, samples: Sequence[Sample], job: JobSpec) -> None:
        """Raises Refusal(CONFIG_INVALID) for options that make no steps."""
        _check(samples, job)
        self._samples = samples
        self._job = job
        self._lengths = [len(sample.tokens) for sample in samples]
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self._ends: list[int] = []
        if job.steps:
            self.steps = job.steps
        else:
            whole = int(job.epochs)
            self._grow(ceil(job.epochs) - 1)
            rest = job.epochs - whole
            self.steps = self._ends[whole - 1] if whole else 0
            if rest:
                self.steps += ceil(rest * (self._ends[whole] - self.steps) - 1e-9)

    def step(self, i: int) -> list[MicroBatch]:
        """Returns the micro-batches of step `i`, counted from 0."""
        epoch = self.epoch(i)
        first = (i - (self._ends[epoch - 1] if epoch else 0)) * self._job.accumulation
        batches = self._epoch(epoch)[first : first + self._job.accumulation]
        return [MicroBatch.of([self._samples[s] for s in batch]) for batch in batches]

    def epoch(self, i: int) -> int:
        """Returns the epoch of step `i`, counted from 0."""
        if not 0 <= i < self.steps:
            raise IndexError(f"step {i} of {self.steps}")
        while not self._ends or i >= self._ends[-1]:
            self._grow(len(self._ends))
        return bisect_right(self._ends, i)

    def _grow(self, epoch: int) -> None:
        """Counts the steps up to the end of `epoch`."""
        for e in range(len(self._ends), epoch + 1):
            batches = -(-len(self._samples) // self._job.batch_size)
            if self._job.pack:
                batches = len(self._epoch(e))
            steps = -(-batches // self._job.accumulation)
            self._ends.append((self._ends[-1] if self._ends else 0) + steps)

    def _lay_out(self, epoch: int) -> list[list[int]]:
        """Returns the micro-batches of an epoch, as indices of samples."""
        # random() is the only method whose values Python guarantees for a seed.
        draw = random.Random(f"{self._job.seed}/{epoch}").random  # noqa: S311
        keys = [draw() for _ in self._samples]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        if self._job.pack:
            return self._packed(order)
        size = self._job.batch_size
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _packed(self, order: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        first = 0
        room: list[int] = []  # of batches[first:]
        for sample in order:
            length = self._lengths[sample]
            at = next((i for i, left in enumerate(room) if length <= left), len(room))
            if at == len(room):
                room.append(self._job.max_tokens)
                batches.append([])
            batches[first + at].append(sample)
            room[at] -= length
            if len(room) > OPEN:
                first += 1
                del room[0]
        return batches


def in_order(samples: Sequence[Sample], job: JobSpec) -> list[MicroBatch]:
    """Lays out every sample once, in order, in micro-batches of the job's size, for evaluation."""
    batches: list[list[Sample]] = []
    held = 0
    for sample in samples:
        full = (
            held + len(sample.tokens) > job.max_tokens
            if job.pack
            else bool(batches) and len(batches[-1]) == job.batch_size
        )
        if not batches or full:
            batches.append([])
            held = 0
        batches[-1].append(sample)
        held += len(sample.tokens)
    return [MicroBatch.of(batch) for batch in batches]


def _check(samples: Sequence[Sample], job: JobSpec) -> None:
    path = f"jobs.{job.name}"
    problems = problems_of(job, path)
    if not samples:
        problems.append(Problem(f"{path}.data", "there are no examples to train on"))
    longest = max((len(sample.tokens) for sample in samples), default=0)
    if job.pack and longest > job.max_tokens:
        text = (
            f"max_tokens is {job.max_tokens}, but the longest example has {longest} tokens; raise "
            "it, or lower max_length"
        )
        problems.append(Problem(f"{path}.max_tokens", text))
    if problems:
        raise refusal(Reason.CONFIG_INVALID, problems)
