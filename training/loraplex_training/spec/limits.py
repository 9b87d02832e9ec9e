"""What values a run's options may have. Reads no file and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from loraplex_adapters.store.ids import check_name
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.spec.metric import rule
from loraplex_training.spec.spec import JobSpec, RunSpec

OPTIMISERS = ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd")

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
"""transformers' names."""

LEARN = ("auto", "completion", "assistant", "all")
DTYPES = ("float32", "bfloat16", "float64")
"""float64 is for checks: everything in it, and slow."""


def problems_of(spec: RunSpec) -> list[str]:
    """Everything that is out of range, one sentence each."""
    found = [f"[run]: {problem}" for problem in _of_run(spec)]
    names = [job.name for job in spec.jobs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"{names.count(name)} jobs are called {name!r}; each needs a name of its own")
    for job in spec.jobs:
        found += [f"job {job.name!r}: {problem}" for problem in _of_job(job)]
    return found


def check(spec: RunSpec) -> None:
    """Raises Refusal(CONFIG_INVALID) if anything is out of range."""
    problems = problems_of(spec)
    if problems:
        raise Refusal.listing(Reason.CONFIG_INVALID, problems)


def _of_run(spec: RunSpec) -> Iterator[str]:
    if not spec.jobs:
        yield "there is no job; give --data and --name, or a [[job]] in the file"
    yield from _choice("dtype", spec.dtype, DTYPES)
    if spec.device not in ("auto", "cpu", "cuda") and not spec.device.startswith("cuda:"):
        yield f"device is {spec.device!r}; it should be auto, cpu or cuda"
    yield from _range("threads", spec.threads, 0, 1024)
    yield from _range("save_every", spec.save_every, 1)
    yield from _range("keep", spec.keep, 1)


def _of_job(job: JobSpec) -> Iterator[str]:
    try:
        check_name(job.name)
    except Refusal as error:
        yield str(error)
    data, optim = job.data, job.optim
    yield from _range("eval_fraction", data.eval_fraction, 0, below=1)
    yield from _range("max_length", data.max_length, 2)
    yield from _choice("learn", data.learn, LEARN)
    yield from _choice("optimiser", optim.name, OPTIMISERS)
    yield from _choice("schedule", optim.schedule, SCHEDULES)
    yield from _range("lr", optim.lr, above=0)
    yield from _range("weight_decay", optim.weight_decay, 0)
    for beta in optim.betas:
        yield from _range("betas", beta, 0, below=1)
    yield from _range("eps", optim.eps, above=0)
    yield from _range("warmup", optim.warmup, 0, below=1)
    yield from _range("clip", optim.clip, 0)
    yield from _range("epochs", job.epochs, above=0)
    for name, least in (("steps", 0), ("batch_size", 1), ("accumulation", 1), ("max_tokens", 2),
                        ("eval_every", 0), ("patience", 0), ("metric_examples", 1)):  # fmt: skip
        yield from _range(name, getattr(job, name), least)
    yield from _range("seed", job.seed, 0, (1 << 63) - 1)
    if job.metric:
        try:
            rule(job.metric)
        except Refusal as error:
            yield str(error)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> Iterator[str]:
    if value not in choices:
        yield f"{name} is {value!r}; it should be one of {', '.join(choices)}"


def _range(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Iterator[str]:
    """`least` and `most` are allowed values, `above` and `below` are not."""
    tests = (
        (least is None or value >= least, f"at least {least}"),
        (above is None or value > above, f"above {above}"),
        (most is None or value <= most, f"at most {most}"),
        (below is None or value < below, f"below {below}"),
    )
    wanted = [text for holds, text in tests if not holds]
    if wanted:
        yield f"{name} is {value}; it should be {' and '.join(wanted)}"
    elif not math.isfinite(value):
        yield f"{name} is {value}; it should be a finite number"
