"""Methods by name; each writes files that PEFT reads.

A maker takes its options out, calls `options.done()`, and only then works on the base, so that
every wrong option is told at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import cast

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.options import Options
from loraplex_training.spec.spec import MethodSpec

Maker = Callable[[Options, Setting], TrainedAdapter]

METHODS: Mapping[str, str] = {
    "lora": "lora",
    "dora": "dora",
    "adalora": "adalora",
    "fishmask": "fishmask",
    "prompt_tuning": "virtual",
    "p_tuning": "virtual",
    "prefix_tuning": "virtual",
    "ia3": "vectors",
    "bitfit": "vectors",
    "bottleneck": "bottleneck",
}
"""The module of this package that has the maker, a function of the method's name."""

_FULL = ("full", "full_fine_tuning", "fine_tuning", "finetune")


def make(spec: MethodSpec, setting: Setting) -> TrainedAdapter:
    """A new adapter by the method's name and options.

    Raises Refusal METHOD_INVALID: an unknown name, or all that is wrong with the options.
    """
    if spec.name in _FULL:
        raise Refusal(
            Reason.METHOD_INVALID,
            "full fine-tuning would change the base, which all adapters share and which stays as "
            "it is; train a LoRA with target_modules=all-linear and a high r instead, which comes "
            "close to it",
        )
    if spec.name not in METHODS:
        near = difflib.get_close_matches(spec.name, METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        known = ", ".join(METHODS)
        raise Refusal(
            Reason.METHOD_INVALID, f"there is no method {spec.name!r}{hint}; there are {known}"
        )
    module = import_module(f"{__name__}.{METHODS[spec.name]}")
    maker = cast(Maker, getattr(module, spec.name))
    return maker(Options(spec.name, spec.options), setting)
