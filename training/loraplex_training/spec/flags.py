"""The flags of `loraplex-train`, made from what a run can be told, each with its line of help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, Final

import typer

from loraplex_training.spec.parse import KEYS, RUN_KEYS, Key
from loraplex_training.spec.spec import DataSpec, JobSpec, MethodSpec, OptimSpec, RunSpec

HELP: Final[Mapping[str, str]] = {
    "name": "What the adapter is registered as; lower-case letters, digits and hyphens.",
    "data": "A JSONL file: messages, prompt and completion, instruction and output, or text.",
    "eval_data": "Another file to evaluate on; else some examples of the first are set apart.",
    "eval_fraction": "How much of the data is set apart, chosen by content.",
    "max_length": "Tokens of an example; what is longer is cut and told.",
    "learn": "Whose tokens: auto, completion, assistant or all.",
    "system": "A system message before examples that have none.",
    "method": "See `loraplex-train methods`.",
    "lr": "Learning rate.",
    "optimiser": "adamw, adamw8bit, paged_adamw, paged_adamw8bit or sgd.",
    "weight_decay": "Of the optimiser.",
    "betas": "Of the optimiser.",
    "eps": "Of the optimiser.",
    "schedule": "Of the learning rate, by transformers' name: cosine, linear, constant, ...",
    "warmup": "The share of the steps in which the rate rises.",
    "clip": "The largest norm of the gradient; 0 is none.",
    "epochs": "Passes over the data.",
    "steps": "Optimiser steps, in place of epochs.",
    "batch_size": "Examples of a micro-batch.",
    "accumulation": "Micro-batches of a step; every token of the step weighs alike.",
    "pack": "Fill micro-batches to --max-tokens instead; examples never see each other.",
    "max_tokens": "Of a packed micro-batch.",
    "eval_every": "Steps between evaluations; 0 is once an epoch.",
    "patience": "Evaluations without a better loss before it stops early; 0 is never.",
    "metric": "Of generated answers: exact, json or regex:<expression>.",
    "metric_examples": "How many answers are generated for it.",
    "seed": "Of the order of examples and of initial values.",
    "model": "The base: a directory, a GGUF file, a hub id or default.",
    "dtype": "What the base's dense tensors are kept in: float32 or bfloat16.",
    "device": "auto, cpu or cuda.",
    "threads": "Of the CPU; 0 is torch's choice.",
    "cache": "Where converted base models and compiled kernels lie.",
    "checkpointing": "Compute activations again in the backward pass, to save memory.",
    "save_every": "Steps between checkpoints.",
    "out": "The run's folder (default: var/runs/<name>, numbered where there is one already).",
    "keep": "Checkpoints that are kept.",
}

_DEFAULTS: Final[Mapping[str, Any]] = {
    "": JobSpec, "data": DataSpec, "method": MethodSpec, "optim": OptimSpec, "run": RunSpec
}  # fmt: skip

DATA_FLAGS: Final = ("data", "eval_data", "eval_fraction", "max_length", "learn", "system")
BASE_FLAGS: Final = ("model", "cache")


def with_flags(
    names: Collection[str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds a flag for each key, or those named; the function gets `flags`.

    `flags` are the keys that were given, with their values as text.
    """
    keys = {name: key for name, key in {**KEYS, **RUN_KEYS}.items() if name != "options"}
    chosen = {name: key for name, key in keys.items() if names is None or name in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "flags"
        ]
        made = [_parameter(name, key) for name, key in chosen.items()]

        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in chosen}
            texts = {name: _text(value) for name, value in given.items() if value is not None}
            command(flags=texts, **arguments)

        parameters = [*made, *own]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(name: str, key: Key) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    text = HELP[name] + _default(key)
    if key.hint is bool:
        option = typer.Option(f"{flag}/--no-{flag.removeprefix('--')}", help=text)
        annotation: Any = Annotated[bool | None, option]
    else:
        annotation = Annotated[str | None, typer.Option(flag, help=text, metavar=_metavar(key))]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _metavar(key: Key) -> str:
    if key.hint in (int, float):
        return "N" if key.hint is int else "X"
    return "PATH" if "path" in key.field or key.field in ("out", "cache") else "TEXT"


def _default(key: Key) -> str:
    value = next(f.default for f in fields(_DEFAULTS[key.part]) if f.name == key.field)
    if not isinstance(value, int | float | str | tuple) or value == "" or isinstance(value, bool):
        return ""
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f" (default: {shown})"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
