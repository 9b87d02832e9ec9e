"""The adapter methods by name. Each writes files that PEFT reads (bottlenecks apart).

A maker first checks its options against the base and calls `problems.check()`, and only then makes
tensors, so that every wrong option is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from loraplex_model.base.names import suggest
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.methods.adalora import AdaLoraOptions, adalora
from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.bottleneck import BottleneckOptions, bottleneck
from loraplex_training.methods.dora import dora
from loraplex_training.methods.fishmask import FishMaskOptions, fishmask
from loraplex_training.methods.lora import LoraOptions, lora
from loraplex_training.methods.options import MethodOptions, OptionProblems, TargetOptions
from loraplex_training.methods.vectors import Ia3Options, bitfit, ia3
from loraplex_training.methods.virtual import (
    PrefixTuningOptions,
    PromptTuningOptions,
    PTuningOptions,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
)
from loraplex_training.spec import fields
from loraplex_training.spec.spec import MethodSpec

Options = TypeVar("Options", bound=MethodOptions)


@dataclass(frozen=True, slots=True)
class TrainingMethod(Generic[Options]):
    """A method: the maker of its adapters, whose docstring describes it, and its options."""

    make: Callable[[Options, Setting, OptionProblems], TrainedAdapter]
    options: type[Options]


METHODS: Mapping[str, TrainingMethod[Any]] = {
    "lora": TrainingMethod(lora, LoraOptions),
    "dora": TrainingMethod(dora, LoraOptions),
    "adalora": TrainingMethod(adalora, AdaLoraOptions),
    "fishmask": TrainingMethod(fishmask, FishMaskOptions),
    "prompt_tuning": TrainingMethod(prompt_tuning, PromptTuningOptions),
    "p_tuning": TrainingMethod(p_tuning, PTuningOptions),
    "prefix_tuning": TrainingMethod(prefix_tuning, PrefixTuningOptions),
    "ia3": TrainingMethod(ia3, Ia3Options),
    "bitfit": TrainingMethod(bitfit, TargetOptions),
    "bottleneck": TrainingMethod(bottleneck, BottleneckOptions),
}

_FULL = ("full", "full_fine_tuning", "fine_tuning", "finetune")


def make(spec: MethodSpec, setting: Setting) -> TrainedAdapter:
    """Makes a new adapter by the method's name and options.

    Raises Refusal METHOD_INVALID for an unknown name, or with every problem of the options.
    """
    if spec.name in _FULL:
        raise Refusal(
            Reason.METHOD_INVALID,
            "full fine-tuning would change the base, which all adapters share and which stays as "
            "it is; train a LoRA with target_modules=all-linear and a high r instead, which comes "
            "close to it",
        )
    method = METHODS.get(spec.name)
    if method is None:
        near = suggest(spec.name, METHODS)
        text = f"there is no method {spec.name!r}{near}; there are {', '.join(METHODS)}"
        raise Refusal(Reason.METHOD_INVALID, text, "method")
    given = {name: value for name, value in spec.options.items() if value is not None}
    options, found = fields.read(method.options, given, "method")
    assert options is not None, "every option of a method has a default"
    return method.make(options, setting, OptionProblems(spec.name, found))
