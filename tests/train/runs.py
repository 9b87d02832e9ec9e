"""Whole runs on a tiny base that has a tokenizer: folders, data, options, and who watches them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from loraplex_training.report.events import Event, Observer
from loraplex_training.run.inputs import RunInputs
from loraplex_training.run.run import Run
from loraplex_training.spec.spec import (
    DataSpec,
    JobSpec,
    MethodSpec,
    OptimSpec,
    RunSpec,
)
from loraplex_training.step.job import Job
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model import tiny

Kind = TypeVar("Kind")

LETTERS = [chr(code) for code in range(32, 127)]
MODEL, CACHE, DATA = "model", "cache", "data.jsonl"


class Seen:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Kind], job: str = "") -> list[Kind]:
        """Those of a kind, of one job if it is named."""
        found = [event for event in self.events if isinstance(event, kind)]
        return [event for event in found if not job or getattr(event, "job", "") == job]


class Calling:
    """An observer that calls a function with every event."""

    def __init__(self, function: Any) -> None:
        self.on = function


def write_base(top: Path) -> Path:
    """A tiny Llama with a token for each printable character, in `top`/model."""
    folder = tiny.write("llama", top / MODEL)
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Questions and answers of different lengths; what is answered follows from what is asked."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(chance.choices("abcdef", k=chance.randint(2, 12)))
            line = {"prompt": f"{word}>", "completion": word.upper() * chance.randint(1, 2)}
            file.write(json.dumps(line) + "\n")
    return path


def job(name: str, path: Path, **changes: Any) -> JobSpec:
    """A quick job. Keys of its method go in `options`, of its optimiser in `optim`."""
    data = DataSpec(path, **{"eval_fraction": 0.25, "max_length": 64} | changes.pop("data", {}))
    options = {"r": 4, "target_modules": "q_proj,v_proj"} | changes.pop("options", {})
    method = MethodSpec(changes.pop("method", "lora"), options)
    optim = OptimSpec(**{"lr": 1e-2, "warmup": 0.0} | changes.pop("optim", {}))
    return replace(
        JobSpec(name, data, method, optim, steps=10, batch_size=2, eval_every=4), **changes
    )


def spec(top: Path, out: str, *jobs: JobSpec, **changes: Any) -> RunSpec:
    """A run of these jobs on the base in `top`, in float32."""
    made = RunSpec(
        jobs, top / out, str(top / MODEL), dtype="float32", products="float32", device="cpu",
        threads=1, cache=top / CACHE, save_every=3,
    )  # fmt: skip
    return replace(made, **changes)


def train(made: RunSpec, *observers: Observer, inputs: RunInputs | None = None) -> dict[str, Job]:
    """Runs it to the end."""
    return dict(Run.start(made, observers, inputs).train())


def parameters(outcome: Job) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in outcome.adapter.parameters.items()}


def alone(made: RunSpec, inputs: RunInputs | None, jobs: Sequence[JobSpec]) -> dict[str, Job]:
    """Each job in a run of its own."""
    outcomes = {}
    for one in jobs:
        single = replace(made, jobs=(one,), out=made.out.with_name(f"alone-{one.name}"))
        outcomes |= train(single, inputs=inputs)
    return outcomes


def written(outcome: Job) -> dict[str, bytes]:
    """The bytes of every tensor that would be saved, and of the configuration."""
    files = outcome.adapter.files()
    found = {name: t.contiguous().numpy().tobytes() for name, t in files.tensors.items()}
    return found | {"config": json.dumps(dict(files.config), sort_keys=True).encode()}
