"""The inputs of a run: base model, tokenizer, examples. Loads and checks them; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.ops import build as kernels
from loraplex_model.ops.devices import resolve
from loraplex_model.ops.dtypes import BY_NAME

from loraplex_training import data, methods
from loraplex_training.data import Batches, Dataset
from loraplex_training.data.text import BaseText
from loraplex_training.methods.base import Setting
from loraplex_training.run import precision
from loraplex_training.spec.fields import refusal
from loraplex_training.spec.spec import DataSpec, JobSpec, RunSpec
from loraplex_training.step.job import Job
from loraplex_training.step.optimiser import problem_of

Made = TypeVar("Made")
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class RunInputs:
    """The base model and the data of a run.

    Attributes:
        datasets: the data set of each job; jobs with equal data options share one.
    """

    base: LoadedBase
    text: BaseText
    datasets: Mapping[str, Dataset]

    @staticmethod
    def open(spec: RunSpec) -> RunInputs:
        """Loads the base model and the data. Raises Refusal with the problems of all data."""
        kernels.chosen_isa()  # a wrong one is refused on every device, as the server does
        device = device_of(spec)
        spec = precision.chosen(spec, device)
        try:
            base = load_base(spec.model, BY_NAME[spec.dtype], spec.cache, device=device)
        except Refusal as error:
            raise Refusal(Reason.CONFIG_INVALID, f"{error.reason}: {error.message}") from error
        text = BaseText(
            base.directory,
            base.weights.eos_token_ids,
            special_tokens_in_messages=spec.special_tokens_in_messages,
            chat_template=spec.chat_template,
        )
        specs: list[DataSpec] = []
        for job in spec.jobs:
            if job.data not in specs:
                specs.append(job.data)
        loaded = all_of(specs, lambda one: data.load(one, text))
        datasets = {job.name: loaded[specs.index(job.data)] for job in spec.jobs}
        return RunInputs(base, text, datasets)

    def jobs(self, spec: RunSpec) -> list[Job]:
        """Makes the jobs as before their first step. Raises Refusal with the problems of all."""
        return all_of(spec.jobs, self._job)

    @property
    def identity(self) -> dict[str, Any]:
        """Digests of the base model, its tokenizer and chat template, and the data.

        A checkpoint can be resumed only with the same ones.
        """
        return {
            "base": self.base.weights.fingerprint,
            "text": [self.text.tokenizer_digest, self.text.template_digest],
            "data": {name: [d.digest, d.eval_digest] for name, d in self.datasets.items()},
        }

    def check_same(self, identity: Mapping[str, Any], spec: RunSpec) -> None:
        """Raises Refusal if the `identity` of a checkpoint differs: BASE_MISMATCH, DATA_INVALID."""
        mine = self.identity
        if identity["base"] != mine["base"]:
            raise Refusal(
                Reason.BASE_MISMATCH,
                f"the run was trained on a base model with fingerprint {identity['base']}, and "
                f"{spec.model} has {mine['base']}; restore the model, or start a new run",
            )
        problems = []
        if identity["text"] != mine["text"]:
            text = (
                f"the tokenizer or chat template of {spec.model} has changed since the run began; "
                "restore it, or start a new run"
            )
            problems.append(Problem("", text))
        for job in spec.jobs:
            files = {
                "data": " or ".join(map(str, job.data.paths)),
                "eval_data": job.data.eval_path,
            }
            digests = zip(identity["data"][job.name], mine["data"][job.name], strict=True)
            for (key, path), (then, now) in zip(files.items(), digests, strict=True):
                if then != now:
                    text = (
                        f"{path} has changed since the run began (SHA-256 {then[:12]}…, now "
                        f"{now[:12]}…); restore it, or start a new run"
                    )
                    problems.append(Problem(f"jobs.{job.name}.{key}", text))
        if problems:
            raise refusal(Reason.DATA_INVALID, problems)

    def _job(self, spec: JobSpec) -> Job:
        weights, dataset = self.base.weights, self.datasets[spec.name]
        path = f"jobs.{spec.name}"
        if text := problem_of(spec.optim, weights.embed.device):
            raise refusal(Reason.CONFIG_INVALID, [Problem(f"{path}.optimiser", text)])
        if spec.patience and not dataset.evaluation:
            text = "patience needs an evaluation loss, and there are no evaluation examples"
            raise refusal(Reason.CONFIG_INVALID, [Problem(f"{path}.patience", text)])
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
    """Returns the device of the run. Raises Refusal(CONFIG_INVALID) if there is no such device."""
    try:
        device = resolve(spec.device)
    except RuntimeError:
        raise Refusal(Reason.CONFIG_INVALID, f"there is no device {spec.device!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refusal(
            Reason.CONFIG_INVALID,
            f"device is {spec.device}, and torch finds {torch.cuda.device_count()} GPUs here; "
            "use --device cpu",
        )
    return device


def all_of(asked: Iterable[Asked], make: Callable[[Asked], Made]) -> list[Made]:
    """Calls `make` for each item. Raises one Refusal with the problems of all that failed.

    Its reason is that of the first one.
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
