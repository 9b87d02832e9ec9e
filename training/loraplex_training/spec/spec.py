"""What a training run is, as values: jobs, their data, method and optimiser.

Each option is declared here and nowhere else: its name, type, limits and default, and as the
attribute's docstring the help of its flag. `parse` reads and writes runs, `flags` makes the flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from loraplex_adapters.store.index.ids import check_name
from loraplex_model.base.refusal import Refusal
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo

from loraplex_training.spec.fields import (
    AboveZero,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Whole,
    expected,
    split_names,
)
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

BLANK_IS_NONE: Final = BeforeValidator(lambda value: None if value == "" else value)


def _pair(value: object) -> object:
    pair = value.split(",") if isinstance(value, str) else value
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise expected("two numbers, as in 0.9,0.999")
    return tuple(pair)


def _paths(value: object) -> Path | tuple[Path, ...]:
    """One path as it is, several as a tuple."""
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(isinstance(one, str | Path) and str(one) for one in given):
        raise expected("a file, or a list of files")
    if len(set(map(str, given))) < len(given):
        raise expected("a list of different files")
    first, *others = (Path(str(one)) for one in given)
    return (first, *others) if others else first


def _one_for_each_file(weights: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
    files = info.data.get("data")
    if weights and files is not None:
        count = len(files) if isinstance(files, tuple) else 1
        if len(weights) != count:
            raise ValueError(
                f"data_weights has {len(weights)} numbers, and data names {count}; give one weight "
                "for each file"
            )
    return weights


def _split(value: object) -> object:
    """Splits text like "0.7,0.3"; returns other values as they are."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def _different(columns: Mapping[str, str]) -> Mapping[str, str]:
    for name in columns.values():
        if list(columns.values()).count(name) > 1:
            raise ValueError(f"columns names {name!r:.80} twice")
    return columns


Names: TypeAlias = Annotated[Mapping[str, str], BeforeValidator(split_names)]


def _passing(check: Callable[[str], object]) -> AfterValidator:
    """A validator of text that `check` raises no Refusal for."""

    def validate(value: str) -> str:
        try:
            check(value)
        except Refusal as error:
            raise ValueError(str(error)) from None
        return value

    return AfterValidator(validate)


_METRIC: Final = _passing(lambda text: text and rule(text))


def _device(value: str) -> str:
    if value not in ("auto", "cpu", "cuda") and not value.startswith("cuda:"):
        raise expected("auto, cpu or cuda")
    return value


@dataclass(frozen=True, slots=True)
class DataSpec:
    """The examples of a job, and how they become tokens."""

    path: Annotated[Path | tuple[Path, ...], PlainValidator(_paths), Field(alias="data")]
    """File of training examples: JSON lines, a JSON list, CSV, TSV or Parquet, also gzipped. May be
    repeated."""
    eval_path: Annotated[Path | None, Field(alias="eval_data"), BLANK_IS_NONE] = None
    """File of evaluation examples. Without it, some training examples are set apart."""
    eval_fraction: Fraction = 0.1
    """Fraction of the examples that is set apart for evaluation, by a hash of their content."""
    max_length: Annotated[Whole, Field(ge=2)] = 512
    """Maximum tokens per example. Longer examples are cut and counted."""
    learn: LearnRule = "auto"
    """Tokens to learn: completion (the last answer), assistant (every answer), all, or auto (all
    for text, assistant for messages, else completion)."""
    system: Annotated[str | None, BLANK_IS_NONE] = None
    """System message put before examples that have none."""
    weights: Annotated[
        tuple[AboveZero, ...],
        BeforeValidator(_split),
        AfterValidator(_one_for_each_file),
        Field(alias="data_weights"),
    ] = ()
    """Shares of several --data files in an epoch, in their order, as in 0.7,0.3. Examples of a file
    are repeated to reach its share. Without weights each example is taken once."""
    columns: Annotated[Names, AfterValidator(_different)] = field(default_factory=dict)
    """Names of the data's keys or columns, as in prompt=question,completion=answer, which reads
    the column question as prompt."""
    shape: str = ""
    """Shape of all examples, such as messages, prompt or instruction. Other keys are then ignored.
    Without it, the keys of each example determine its shape."""
    roles: Names = field(default_factory=dict)
    """Roles in the data with their usual names, as in human=user,bot=assistant."""
    strict: bool = False
    """Refuse lines that would be dropped, such as conversations that end with a question."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of training examples."""
        return self.path if isinstance(self.path, tuple) else (self.path,)


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """The adapter method of a job and its options, which `methods.make` checks."""

    name: Annotated[str, Field(alias="method")] = "lora"
    """Adapter method. `loraplex-train methods` lists them."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options of the method by name."""


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

    name: Annotated[OptimiserName, Field(alias="optimiser")] = "adamw"
    """Optimiser: adamw, adamw8bit, paged_adamw, paged_adamw8bit or sgd."""
    lr: AboveZero = 2e-4
    """Peak learning rate. Some methods have their own default."""
    weight_decay: NotNegative = 0.0
    """Weight decay of the optimiser."""
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.999)
    """Decay rates of AdamW's two moment estimates."""
    eps: AboveZero = 1e-8
    """Term added to AdamW's denominator for numerical stability."""
    schedule: ScheduleName = "cosine"
    """Learning rate schedule, by its name in transformers: cosine, linear, constant, ..."""
    warmup: Fraction = 0.03
    """Fraction of the steps in which the learning rate rises from 0."""
    clip: NotNegative = 1.0
    """Maximum norm of a job's gradient. 0 disables clipping."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One adapter to train. `data`, `method` and `optim` hold the options that belong together."""

    name: Annotated[str, _passing(check_name)]
    """Name under which the adapter is registered: lower-case letters, digits and hyphens."""
    data: DataSpec
    method: MethodSpec = field(default_factory=MethodSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    epochs: AboveZero = 3.0
    """Number of passes over the training data."""
    steps: Count = 0
    """Number of optimiser steps. If not 0, it replaces the number of epochs."""
    batch_size: Positive = 4
    """Examples per micro-batch."""
    accumulation: Positive = 1
    """Micro-batches per optimiser step. Every token of a step has the same weight."""
    pack: bool = False
    """Fill micro-batches up to --max-tokens, instead of a fixed number of examples. Examples never
    see each other."""
    max_tokens: Annotated[Whole, Field(ge=2)] = 1024
    """Maximum tokens per micro-batch with --pack."""
    eval_every: Count = 0
    """Optimiser steps between evaluations. 0 evaluates after each epoch."""
    patience: Count = 0
    """Evaluations without a lower loss after which training stops. 0 never stops early."""
    metric: Annotated[str, _METRIC] = ""
    """Metric that compares generated answers with the data: exact, json or regex:<expression>."""
    metric_examples: Positive = 32
    """Number of answers generated for --metric at each evaluation."""
    seed: Annotated[Count, Field(le=(1 << 63) - 1)] = 0
    """Random seed for example order, initial values and dropout."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run: jobs that train together over one base model."""

    jobs: tuple[JobSpec, ...]
    out: Path
    """Directory of the run. Default: var/runs/<name>, with a number if that holds a run already."""
    model: str = "default"
    """Base model: a directory, a GGUF file, a hub id, or `default`."""
    chat_template: Annotated[Path | None, BLANK_IS_NONE] = None
    """File with a chat template (Jinja), in place of the model's. The server needs the same."""
    special_tokens_in_messages: bool = False
    """Recognise control tokens that messages spell out; the server needs the same setting. By
    default they are text."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Data type of the base model's dense tensors: float32, bfloat16, float64 for numerical checks
    (slow), or auto, which is bfloat16 if products are and otherwise float32."""
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type in which matrix products on a CPU read and write; they sum in float32. auto is
    bfloat16 if the processor has instructions for it and dtype is auto or bfloat16."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Device to compute on: cpu, cuda, or auto, which uses CUDA if available."""
    threads: Annotated[Count, Field(le=1024)] = 0
    """Number of CPU threads. 0 leaves the choice to torch."""
    cache: Path = Path("var/cache")
    """Directory for converted base models and compiled kernels."""
    checkpointing: bool = False
    """Recompute the MLPs' activations in the backward pass. Saves memory and takes longer."""
    save_every: Positive = 50
    """Optimiser steps between checkpoints of the run."""
    keep: Positive = 2
    """Number of checkpoints to keep."""
    keep_evaluated: Count = 0
    """Number of evaluated adapters to keep, the latest, in <out>/<name>/step-<N>. 0 keeps none."""
