"""Reports before training: the data's tokens, the costs of a run, the methods."""

from __future__ import annotations

import inspect as introspect
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import torch
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraplex_training.data import Dataset
from loraplex_training.data.show import report, show
from loraplex_training.methods import METHODS
from loraplex_training.report.progress import duration_text, size_text
from loraplex_training.run import costs, precision, preflight
from loraplex_training.run.inputs import RunInputs, device_of
from loraplex_training.run.process_settings import process_settings
from loraplex_training.spec.flags import default_text
from loraplex_training.spec.spec import RATES, OptimSpec, RunSpec
from loraplex_training.step.job import Job
from loraplex_training.step.joint import JointPass, Part

BACKWARD: Final = 3.0
"""Cost of a forward and backward pass in forward passes, roughly. The frozen base model needs no
gradients of its weights, but its products are computed again, and with checkpointing half of
the forward pass."""


def inspect(spec: RunSpec, console: Console, count: int) -> None:
    """Shows examples with their loss mask, and the counts. Raises Refusal."""
    inputs = RunInputs.open(spec)
    for job in spec.jobs:
        console.print(show(inputs.datasets[job.name], inputs.text, count))


def plan(spec: RunSpec, console: Console, as_json: bool = False) -> None:
    """Shows steps, tokens, memory and time of a run; `as_json` prints one line of JSON instead.

    The time is extrapolated from one forward pass. Trains nothing and writes nothing. Raises
    Refusal.
    """
    with process_settings(spec):
        spec = precision.chosen(spec, device_of(spec))
        inputs = RunInputs.open(spec)
        jobs = inputs.jobs(spec)
        preflight.check(jobs, inputs.base.weights.info)
        found = _plan(spec, inputs, jobs)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    shown: list[Dataset] = []
    for dataset in inputs.datasets.values():
        if not any(dataset is one for one in shown):  # jobs on the same data share theirs
            shown.append(dataset)
            console.print(report(dataset.report))
    table = Table(title="jobs", title_justify="left")
    for column in ("job", "method", "parameters", "optimiser", "steps", "tokens", "tokens a step"):
        table.add_column(column, justify="left" if column in ("job", "method") else "right")
    for job in found.jobs:
        cells = (job.parameters, job.optimiser, job.steps, job.tokens, job.tokens // job.steps)
        shown_cells = (f"{cell:,}" if isinstance(cell, int) else cell for cell in cells)
        table.add_row(escape(job.name), job.method, *shown_cells)
    console.print(table)
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in found.memory.items())
    console.print(f"memory: {size_text(found.bytes)} at the peak on {found.device}: {parts}")
    console.print(f"time: about {duration_text(found.seconds)}, estimated from one pass")


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Size of one job."""

    name: str
    method: str
    parameters: int
    optimiser: str
    steps: int
    tokens: int


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Estimated cost of a run.

    Attributes:
        bytes: peak memory.
        memory: parts of `bytes`, by purpose.
        available_bytes: bytes that are free on the GPU now; None if the device is the CPU.
        seconds: estimated training time.
    """

    bytes: int
    memory: Mapping[str, int]
    device: str
    available_bytes: int | None
    seconds: float
    jobs: Sequence[JobPlan]


def _plan(spec: RunSpec, inputs: RunInputs, jobs: Sequence[Job]) -> RunPlan:
    device = inputs.base.weights.embed.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    memory = costs.of(inputs.base.weights, jobs, spec)
    plans = [
        JobPlan(
            job.name,
            job.spec.method.name,
            job.parameters,
            job.optimiser,
            job.batches.steps,
            _tokens(job),
        )
        for job in jobs
    ]
    seconds = _seconds(inputs, jobs, spec)
    return RunPlan(memory.total, memory.items, str(device), free, seconds, plans)


def methods(console: Console) -> None:
    """Lists the methods with their options, from their declarations."""
    table = Table("method", "--lr", "description and options (--set KEY=VALUE)")
    for name, method in METHODS.items():
        lines = [described(method.make), *map(_option, method.options.model_fields.items())]
        lr = RATES.get(name, OptimSpec().lr)
        table.add_row(name, f"{lr:g}", escape("\n".join(lines)))
        table.add_section()
    console.print(table)
    console.print(
        "Full fine-tuning is not among them: all adapters share the base model, which is frozen."
    )


def described(maker: object) -> str:
    """Returns a maker's docstring with one line per paragraph."""
    text = introspect.getdoc(maker) or ""
    return "\n".join(re.sub(r"\s+", " ", part) for part in text.split("\n\n"))


def _option(declared: tuple[str, FieldInfo]) -> str:
    """Returns the line of an option: its name, description and default."""
    name, info = declared
    default = info.get_default(call_default_factory=True, validated_data={})
    return f"{name}: {' '.join(str(info.description).split())}{default_text(default)}"


def _tokens(job: Job) -> int:
    """Returns the number of tokens of all steps, extrapolated from the first 200."""
    steps = min(job.batches.steps, 200)
    seen = sum(len(b.tokens) for i in range(steps) for b in job.batches.step(i))
    return round(seen * job.batches.steps / steps)


def _seconds(inputs: RunInputs, jobs: Sequence[Job], spec: RunSpec) -> float:
    """Extrapolates the time of all steps from a pass over the first micro-batch of each job."""
    joint = JointPass(
        inputs.base.weights,
        checkpointing=spec.checkpointing,
        products=precision.products_of(spec),
    )
    first = [Part(None, job.batches.step(0)[0]) for job in jobs]
    joint.losses(first)  # one-off work, so that it is not timed
    began = time.monotonic()
    joint.losses(first)
    per_token = (time.monotonic() - began) / sum(len(part.batch.tokens) for part in first)
    factor = BACKWARD + 0.5 * spec.checkpointing
    return factor * per_token * sum(_tokens(job) for job in jobs)
