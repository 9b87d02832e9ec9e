"""Estimates the peak memory of a run from the sizes of its jobs (see `step.memory`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from loraplex_model.adapters.delta import BottleneckDelta, ProjectionDelta
from loraplex_model.base.config import MODEL
from loraplex_model.base.weights import BaseWeights

from loraplex_training.run import precision
from loraplex_training.run.evaluate import SHOWN
from loraplex_training.run.evaluate import delta as delta_of
from loraplex_training.run.generate import CACHE_TOKENS
from loraplex_training.spec.spec import RunSpec
from loraplex_training.step.job import Job
from loraplex_training.step.loss import changes_head
from loraplex_training.step.memory import AdapterSize, Estimate, estimate

STEPS: Final = 500
"""Number of steps searched for the largest micro-batch. Later ones are drawn in the same way."""


def of(base: BaseWeights, jobs: Sequence[Job], spec: RunSpec) -> Estimate:
    """Estimates the bytes in use at the peak, which is while answers are generated.

    By then training still holds its memory or has not returned it to the operating system.
    """
    tokens, learned, sizes = zip(*map(_sizes, jobs), strict=True)
    trained = estimate(
        base, sum(tokens), sizes, spec.checkpointing, sum(learned), precision.products_of(spec)
    )
    return Estimate({**trained.items, "generating answers": _generating(base, jobs)})


def _sizes(job: Job) -> tuple[int, int, AdapterSize]:
    """Returns the most tokens and learned tokens of a micro-batch, and the adapter's size."""
    delta = delta_of(job)
    virtual = delta.virtual.count if delta.virtual else 0
    tokens = learned = 0
    for step in range(min(job.batches.steps, STEPS)):
        for batch in job.batches.step(step):
            examples = len(batch.starts) - 1
            tokens = max(tokens, len(batch.tokens) + virtual * examples)
            learned = max(learned, batch.learned)
    layers: dict[int, int] = {}
    for (layer, _), change in delta.sites.items():
        if layer == MODEL:
            continue
        up = change.up if isinstance(change, BottleneckDelta) else None
        up = change.b if isinstance(change, ProjectionDelta) else up
        layers[layer] = layers.get(layer, 0) + (0 if up is None else len(up))
    size = AdapterSize(
        job.parameters,
        max(p.itemsize for p in job.adapter.parameters.values()),
        job.spec.optim.name,
        max(layers.values(), default=0),
        changes_head(delta),
    )
    return tokens, learned, size


def _generating(base: BaseWeights, jobs: Sequence[Job]) -> int:
    """Bytes of the serving decoder's own copy of the NF4 codes and of its KV cache."""
    config = base.config
    tokens = 0
    for job in jobs:
        examples = max(SHOWN, job.spec.metric_examples if job.spec.metric else 0)
        longest = max((len(batch.tokens) for batch in job.evaluation), default=0)
        room = 2 * min(longest, job.spec.data.max_length)  # the prompt, and an answer as long
        tokens = max(tokens, min(CACHE_TOKENS, examples * room))
    item = 4 if base.embed.dtype == torch.float64 else base.embed.itemsize
    dense = {tensor.data_ptr(): tensor.nbytes for tensor in (base.embed, base.lm_head)}
    copied = 0 if base.embed.is_cuda else base.nbytes - sum(dense.values())
    return copied + 2 * config.num_layers * config.kv_size * tokens * item
