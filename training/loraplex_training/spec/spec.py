"""What a training run is, as values: jobs, their data, method and optimiser.

Made by `options` from flags, a TOML file or a request; written to the run's folder; compared when a
run is resumed. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Where examples come from and how they are cut.

    Attributes:
        path: a JSONL file; `eval_path` another, or None: `eval_fraction` of `path` is set apart, by
            a hash of each example, so the choice does not depend on the order of lines.
        max_length: tokens of an example beyond this are cut, and the cuts reported.
        learn: "auto", "completion" (only the last answer), "assistant" (every assistant turn) or
            "all". "auto" is "all" for {"text"}, "assistant" for {"messages"}, else "completion".
        system: a system message put before examples that have none, or None.
    """

    path: Path
    eval_path: Path | None = None
    eval_fraction: float = 0.1
    max_length: int = 512
    learn: str = "auto"
    system: str | None = None


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """Which adapter is trained. `options` are the method's own; `methods.make` checks them."""

    name: str = "lora"
    options: Mapping[str, object] = field(default_factory=dict)


RATES: Mapping[str, float] = {
    "prompt_tuning": 1e-2,
    "p_tuning": 1e-3,
    "prefix_tuning": 1e-2,
    "ia3": 5e-3,
    "bitfit": 1e-3,
    "bottleneck": 1e-3,
}
"""Learning rates of methods, where a job names none, that differ from `OptimSpec.lr`, LoRA's: few
numbers, far from what they will be, have to move further. Starting points, not measurements."""


@dataclass(frozen=True, slots=True)
class OptimSpec:
    """How its parameters move.

    Attributes:
        name: "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd".
        schedule: a name that `transformers.get_scheduler` knows: "constant", "linear", "cosine", …
        warmup: the share of all steps in which the rate rises from 0.
        clip: the largest norm of a job's gradient; 0 leaves it as it is.
    """

    name: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "cosine"
    warmup: float = 0.03
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One adapter to be made.

    Attributes:
        name: what it is registered as; a name that the store takes.
        epochs: passes over the data; `steps`, if not 0, is the number of optimiser steps instead.
        batch_size: examples of a micro-batch; with `pack` as many as `max_tokens` tokens hold.
        accumulation: micro-batches of an optimiser step; the loss weighs every token alike.
        eval_every: optimiser steps between evaluations; 0 is once an epoch.
        patience: evaluations without a better loss after which it stops; 0 never stops.
        metric: "" or "exact" or "regex:<expression>": generated answers held against the data.
        seed: of the order of examples, of initial values, of dropout.
    """

    name: str
    data: DataSpec
    method: MethodSpec = field(default_factory=MethodSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    epochs: float = 3.0
    steps: int = 0
    batch_size: int = 4
    accumulation: int = 1
    pack: bool = False
    max_tokens: int = 1024
    eval_every: int = 0
    patience: int = 0
    metric: str = ""
    metric_examples: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run: jobs that train together over one base.

    Attributes:
        model: what `load_base` takes; dtype: "float32" or "bfloat16", of what the base stores.
        device: "auto", "cpu" or "cuda". threads: 0 is torch's choice.
        checkpointing: recompute each layer's activations in the backward pass (less memory).
        save_every: optimiser steps between checkpoints of the whole run.
        out: the run's folder.
        keep: checkpoints kept.
    """

    jobs: tuple[JobSpec, ...]
    out: Path
    model: str = "default"
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 0
    cache: Path = Path("var/cache")
    checkpointing: bool = False
    save_every: int = 50
    keep: int = 2
