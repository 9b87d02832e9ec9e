"""What a run stands on: the base, its text side, the examples. Opened and checked, not written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.ops import build as kernels

from loraplex_training import data, methods
from loraplex_training.data import Batches, Dataset
from loraplex_training.data.text import BaseText
from loraplex_training.methods.base import Setting
from loraplex_training.spec.fields import refusal
from loraplex_training.spec.spec import DataSpec, JobSpec, RunSpec
from loraplex_training.step.job import Job
from loraplex_training.step.optimiser import problem_of

Made = TypeVar("Made")
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Ground:
    """The base and the data of a run.

    Attributes:
        datasets: by job; jobs on the same data share theirs.
    """

    base: LoadedBase
    text: BaseText
    datasets: Mapping[str, Dataset]

    @staticmethod
    def open(spec: RunSpec) -> Ground:
        """Loads both. Raises Refusal with the problems of all jobs' data."""
        device = device_of(spec)
        if device.type == "cpu":
            with suppress(kernels.KernelsUnavailable):  # told by who needs them
                kernels.load(directory=spec.cache / "kernels")  # where a server keeps its own
        try:
            dtype = getattr(torch, spec.dtype)
            base = load_base(spec.model, dtype, spec.cache, device=device)
        except Refusal as error:
            raise Refusal(Reason.CONFIG_INVALID, f"{error.reason}: {error.message}") from error
        text = BaseText.open(base.directory, base.weights.eos_token_ids)
        specs: list[DataSpec] = []
        for job in spec.jobs:
            if job.data not in specs:
                specs.append(job.data)
        loaded = all_of(specs, lambda one: data.load(one, text))
        return Ground(
            base, text, {job.name: loaded[specs.index(job.data)] for job in spec.jobs}
        )  # fmt: skip

    def jobs(self, spec: RunSpec) -> list[Job]:
        """The jobs at their start, not prepared. Raises Refusal with the problems of all."""
        return all_of(spec.jobs, self._job)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint goes on from: digests of the base, its text side and the data."""
        return {
            "base": self.base.weights.fingerprint,
            "text": [self.text.tokenizer_digest, self.text.template_digest],
            "data": {name: [d.digest, d.eval_digest] for name, d in self.datasets.items()},
        }

    def check_same(self, identity: Mapping[str, Any], spec: RunSpec) -> None:
        """Raises Refusal if a checkpoint's `identity` is not this one's."""
        mine = self.identity
        if identity["base"] != mine["base"]:
            raise Refusal(
                Reason.BASE_MISMATCH,
                f"the run was trained on a base with the fingerprint {identity['base']}, and "
                f"{spec.model} is {mine['base']}; give it its base back, or start a new run",
            )
        problems = []
        if identity["text"] != mine["text"]:
            problems.append(
                f"the tokenizer or chat template of {spec.model} is not what the run began with; "
                "give it back, or start a new run"
            )
        for job in spec.jobs:
            for path, then, now in zip(
                (job.data.path, job.data.eval_path),
                identity["data"][job.name],
                mine["data"][job.name],
                strict=True,
            ):
                if then != now:
                    problems.append(
                        f"job {job.name!r}: {path} has changed since the run began (SHA-256 "
                        f"{then[:12]}…, now {now[:12]}…); give it back, or start a new run"
                    )
        if problems:
            raise Refusal.listing(Reason.DATA_INVALID, dict.fromkeys(problems))

    def _job(self, spec: JobSpec) -> Job:
        weights, dataset = self.base.weights, self.datasets[spec.name]
        path = f"jobs.{spec.name}"
        problems = []
        if problem := problem_of(spec.optim, weights.embed.device):
            problems.append(Problem(f"{path}.optimiser", problem))
        elif spec.patience and not dataset.evaluation:
            text = "patience stops by the evaluation loss, and no examples are set apart for it"
            problems.append(Problem(f"{path}.patience", text))
        if problems:
            raise refusal(Reason.CONFIG_INVALID, problems)
        batches = Batches(dataset.train, spec)
        chance = torch.Generator().manual_seed(spec.seed)
        setting = Setting(weights, self.base.name, chance, batches.steps, self.text.ids)
        try:
            adapter = methods.make(spec.method, setting)
        except Refusal as error:
            found = [Problem(f"{path}.{p.field}", p.message) for p in error.problems]
            raise refusal(error.reason, found) from None
        return Job(spec, adapter, batches, data.in_order(dataset.evaluation, spec), chance)


def device_of(spec: RunSpec) -> torch.device:
    """Where the run computes. Raises Refusal(CONFIG_INVALID) if there is no such device."""
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(spec.device)
    except RuntimeError:
        raise Refusal(Reason.CONFIG_INVALID, f"there is no device {spec.device!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refusal(
            Reason.CONFIG_INVALID,
            f"device is {spec.device}, and torch finds {torch.cuda.device_count()} GPUs here; "
            "take --device cpu",
        )
    return device


def all_of(asked: Iterable[Asked], make: Callable[[Asked], Made]) -> list[Made]:
    """Makes one for each; if any cannot be, raises one Refusal with the problems of all.

    Its reason is that of the first.
    """
    made: list[Made] = []
    failed: list[Refusal] = []
    for one in asked:
        try:
            made.append(make(one))
        except Refusal as error:
            failed.append(error)
    if failed:
        problems = [problem for error in failed for problem in error.problems]
        raise refusal(failed[0].reason, list(dict.fromkeys(problems)))
    return made
