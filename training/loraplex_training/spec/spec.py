"""What a training run is, as values: jobs, their data, method and optimiser.

Each option is declared here and nowhere else: its name, type, limits, default, and the help of its
flag. `parse` reads and writes runs, `flags` makes the flags. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from loraplex_adapters.store.ids import check_name
from loraplex_model.base.refusal import Refusal
from pydantic import AfterValidator, BeforeValidator, Field

from loraplex_training.spec.fields import Number, Whole, expected, option
from loraplex_training.spec.metric import rule

OptimiserName = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd"]

ScheduleName = Literal[
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
]
"""Names that `transformers.get_scheduler` takes."""

LearnRule = Literal["auto", "completion", "assistant", "all"]


def _blank_is_none(value: object) -> object:
    return None if value == "" else value


def _pair(value: object) -> object:
    pair = value.split(",") if isinstance(value, str) else value
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise expected("two numbers, as in 0.9,0.999")
    return tuple(pair)


def _adapter_name(value: str) -> str:
    try:
        return check_name(value)
    except Refusal as error:
        raise ValueError(str(error)) from None


def _metric(value: str) -> str:
    try:
        if value:
            rule(value)
    except Refusal as error:
        raise ValueError(str(error)) from None
    return value


def _device(value: str) -> str:
    if value not in ("auto", "cpu", "cuda") and not value.startswith("cuda:"):
        raise expected("auto, cpu or cuda")
    return value


Beta = Annotated[Number, Field(ge=0, lt=1)]


@dataclass(frozen=True, slots=True)
class DataSpec:
    """The examples of a job, and how they become tokens.

    If `eval_path` is None, examples are set apart by a hash of their content, so the choice does
    not depend on the order of the lines.
    """

    path: Annotated[
        Path,
        option(
            "Data",
            "JSONL file of training examples, each with messages, prompt and completion, "
            "instruction and output, or text.",
            alias="data",
        ),
    ]
    eval_path: Annotated[
        Path | None,
        BeforeValidator(_blank_is_none),
        option(
            "Data",
            "JSONL file of evaluation examples. Without it, some training examples are set apart.",
            alias="eval_data",
        ),
    ] = None
    eval_fraction: Annotated[
        Number,
        option(
            "Data",
            "Fraction of the examples that is set apart for evaluation, chosen by content.",
            ge=0,
            lt=1,
        ),
    ] = 0.1
    max_length: Annotated[
        Whole,
        option("Data", "Maximum tokens per example. Longer examples are cut and counted.", ge=2),
    ] = 512
    learn: Annotated[
        LearnRule,
        option(
            "Data",
            "Tokens to learn: completion (the last answer), assistant (every answer), all, or auto "
            "(all for text, assistant for messages, else completion).",
        ),
    ] = "auto"
    system: Annotated[
        str | None,
        BeforeValidator(_blank_is_none),
        option("Data", "System message put before examples that have none."),
    ] = None


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """The adapter method of a job and its options, which `methods.make` checks."""

    name: Annotated[
        str,
        option("Method", "Adapter method. `loraplex-train methods` lists them.", alias="method"),
    ] = "lora"
    options: Annotated[
        Mapping[str, object], option("Method", "Options of the method, as a table.")
    ] = field(default_factory=dict)


RATES: Mapping[str, float] = {
    "prompt_tuning": 1e-2,
    "p_tuning": 1e-3,
    "prefix_tuning": 1e-2,
    "ia3": 5e-3,
    "bitfit": 1e-3,
    "bottleneck": 1e-3,
}
"""Default learning rates of methods for which LoRA's (`OptimSpec.lr`) is too low: those with few
parameters, which start far from their final values. Starting points, not measurements."""


@dataclass(frozen=True, slots=True)
class OptimSpec:
    """The optimiser of a job and its learning rate schedule."""

    name: Annotated[
        OptimiserName,
        option(
            "Optimiser",
            "Optimiser: adamw, adamw8bit, paged_adamw, paged_adamw8bit or sgd.",
            alias="optimiser",
        ),
    ] = "adamw"
    lr: Annotated[
        Number,
        option("Optimiser", "Peak learning rate. Some methods have their own default.", gt=0),
    ] = 2e-4
    weight_decay: Annotated[Number, option("Optimiser", "Weight decay of the optimiser.", ge=0)] = (
        0.0
    )
    betas: Annotated[
        tuple[Beta, Beta],
        BeforeValidator(_pair),
        option("Optimiser", "Decay rates of AdamW's two moment estimates."),
    ] = (0.9, 0.999)
    eps: Annotated[
        Number, option("Optimiser", "Term added to AdamW's denominator for stability.", gt=0)
    ] = 1e-8
    schedule: Annotated[
        ScheduleName,
        option(
            "Schedule",
            "Learning rate schedule, by its name in transformers: cosine, linear, constant, ...",
        ),
    ] = "cosine"
    warmup: Annotated[
        Number,
        option(
            "Schedule", "Fraction of the steps in which the learning rate rises from 0.", ge=0, lt=1
        ),
    ] = 0.03
    clip: Annotated[
        Number,
        option("Optimiser", "Maximum norm of a job's gradient. 0 disables clipping.", ge=0),
    ] = 1.0


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One adapter to train. `data`, `method` and `optim` hold the options that belong together."""

    name: Annotated[
        str,
        AfterValidator(_adapter_name),
        option(
            "Output",
            "Name under which the adapter is registered: lower-case letters, digits and hyphens.",
        ),
    ]
    data: DataSpec
    method: MethodSpec = field(default_factory=MethodSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    epochs: Annotated[
        Number, option("Schedule", "Number of passes over the training data.", gt=0)
    ] = 3.0
    steps: Annotated[
        Whole,
        option("Schedule", "Number of optimiser steps. If not 0, it replaces --epochs.", ge=0),
    ] = 0
    batch_size: Annotated[Whole, option("Batches", "Examples per micro-batch.", ge=1)] = 4
    accumulation: Annotated[
        Whole,
        option(
            "Batches",
            "Micro-batches per optimiser step. Every token of a step has the same weight.",
            ge=1,
        ),
    ] = 1
    pack: Annotated[
        bool,
        option(
            "Batches",
            "Fill micro-batches up to --max-tokens instead of counting examples. Examples never "
            "see each other.",
        ),
    ] = False
    max_tokens: Annotated[
        Whole, option("Batches", "Maximum tokens per micro-batch with --pack.", ge=2)
    ] = 1024
    eval_every: Annotated[
        Whole,
        option(
            "Evaluation",
            "Optimiser steps between evaluations. 0 evaluates after each epoch.",
            ge=0,
        ),
    ] = 0
    patience: Annotated[
        Whole,
        option(
            "Evaluation",
            "Evaluations without a lower loss after which training stops. 0 never stops early.",
            ge=0,
        ),
    ] = 0
    metric: Annotated[
        str,
        AfterValidator(_metric),
        option(
            "Evaluation",
            "Metric that compares generated answers with the data: exact, json or "
            "regex:<expression>.",
        ),
    ] = ""
    metric_examples: Annotated[
        Whole,
        option("Evaluation", "Number of answers generated for --metric at an evaluation.", ge=1),
    ] = 32
    seed: Annotated[
        Whole,
        option(
            "Batches",
            "Random seed for example order, initial values and dropout.",
            ge=0,
            le=(1 << 63) - 1,
        ),
    ] = 0


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run: jobs that train together over one base."""

    jobs: tuple[JobSpec, ...]
    out: Annotated[
        Path,
        option(
            "Output",
            "Directory of the run. Default: var/runs/<name>, numbered if that holds a run.",
        ),
    ]
    model: Annotated[
        str,
        option("Model", "Base model: a directory, a GGUF file, a hub id, or `default`."),
    ] = "default"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"],
        option(
            "Model",
            "Data type of the base model's dense tensors: float32 or bfloat16, or float64 for "
            "numerical checks (slow).",
        ),
    ] = "float32"
    device: Annotated[
        str,
        AfterValidator(_device),
        option(
            "Machine",
            "Device to compute on: cpu, cuda, or auto, which uses CUDA if available.",
        ),
    ] = "auto"
    threads: Annotated[
        Whole,
        option("Machine", "Number of CPU threads. 0 leaves the choice to torch.", ge=0, le=1024),
    ] = 0
    cache: Annotated[
        Path, option("Machine", "Directory for converted base models and compiled kernels.")
    ] = Path("var/cache")
    checkpointing: Annotated[
        bool,
        option(
            "Machine",
            "Recompute activations in the backward pass. Saves memory and takes longer.",
        ),
    ] = False
    save_every: Annotated[
        Whole, option("Output", "Optimiser steps between checkpoints of the run.", ge=1)
    ] = 50
    keep: Annotated[Whole, option("Output", "Number of checkpoints to keep.", ge=1)] = 2
