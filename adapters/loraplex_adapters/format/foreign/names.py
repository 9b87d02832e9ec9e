"""Names of tensors as other programs write them, and PEFT's name for the same tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

PREFIX = "base_model.model."


class Wrapper(Enum):
    """What was added to PEFT's name, or left out of it. The value describes the names."""

    COMPILED = "contain _orig_mod., as those of a compiled model do"
    PARALLEL = "have the prefix of a model that was wrapped for several devices"
    NAMED = "contain the adapter's name"
    REPEATED = "have PEFT's prefix in another form"
    BARE = "lack PEFT's prefix base_model.model."
    MULTIMODAL = "are those of the language model within a multimodal model"
    UNEMBED = "call the head unembed_tokens, as Tinker does"


WAYS_OUT = {
    Wrapper.COMPILED: "save the adapter from the model before torch.compile",
    Wrapper.PARALLEL: "save the unwrapped model (accelerator.unwrap_model)",
    Wrapper.NAMED: "save it with PEFT's save_pretrained",
    Wrapper.REPEATED: "save it with PEFT's save_pretrained",
    Wrapper.BARE: "save it with PEFT's save_pretrained",
    Wrapper.MULTIMODAL: "serve the model that it was trained on",
    Wrapper.UNEMBED: "export it for PEFT",
}

_WRAPPED = {
    "_orig_mod": Wrapper.COMPILED,
    "_fsdp_wrapped_module": Wrapper.PARALLEL,
    "_checkpoint_wrapped_module": Wrapper.PARALLEL,
    "_forward_module": Wrapper.PARALLEL,
}
_ABOVE = frozenset({"base_model", "model", "language_model", "text_model"})
_MODULES = frozenset({"layers", "embed_tokens", "norm", "lm_head", "unembed_tokens"})
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_E|lora_ranknum|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|"
    r"hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|miss_block|gralora_[AB](?:_general)?|"
    r"randlora_(?:[AB]|lambda|gamma)|vera_lambda_[bd]|"
    r"delora_(?:[AB]|lambda|w_norm)|hra_u|deft_[PR]|peanut_[AB]|poly_lora_[AB]|vblora_logits_[AB]|lora_diag|"
    r"trainable_tokens_delta|modules_to_save)\.([^.]{1,128})(\.weight|\.bias)?\Z"
)
_WITHOUT_WEIGHT = (
    "lora_E",
    "lora_embedding",
    "lora_magnitude",
    "ia3_l",
    "trainable_tokens",
    "hada_",
    "lokr_",
    "miss_",
    "randlora_",
    "vera_",
    "delora_",
    "hra_",
    "deft_",
    "vblora_",
    "poly_lora",
    "lora_diag",
)


@dataclass(frozen=True, slots=True)
class Spelling:
    """PEFT's name of a tensor.

    Attributes:
        name: PEFT's name.
        wrappers: in which ways the file's name differs; empty if it does not.
        adapter: the adapter's name within the file's name; "" if there is none.
    """

    name: str
    wrappers: tuple[Wrapper, ...] = ()
    adapter: str = ""


def spelling(name: str) -> Spelling | None:
    """PEFT's name for the tensor `name`; None if it leads to no module of a decoder.

    Only names are compared, so that the tensor itself is PEFT's in every other respect.
    """
    wrappers: list[Wrapper] = []
    parts = name.split(".")
    kept = [part for part in parts if part not in _WRAPPED]
    wrappers += {_WRAPPED[part]: None for part in parts if part in _WRAPPED}
    while kept and kept[0] == "module":
        del kept[0]
        wrappers.append(Wrapper.PARALLEL)
    start = next((i for i, part in enumerate(kept) if part in _MODULES), None)
    if start is None or not _ABOVE.issuperset(kept[:start]):
        return None
    above, below = kept[:start], kept[start:]
    if below[0] == "layers" and not (len(below) > 2 and below[1].isdecimal()):
        return None
    if below[0] == "unembed_tokens":
        wrappers.append(Wrapper.UNEMBED)
        below[0] = "lm_head"
        above = above[:2]
    if "language_model" in above or "text_model" in above:
        wrappers.append(Wrapper.MULTIMODAL)
    elif "base_model" not in above:
        wrappers.append(Wrapper.BARE)
    elif above != ["base_model", "model"] + ["model"] * (below[0] != "lm_head"):
        wrappers.append(Wrapper.REPEATED)
    stem = PREFIX + ("" if below[0] == "lm_head" else "model.")
    ending, adapter = _without_name(".".join(below))
    if adapter:
        wrappers.append(Wrapper.NAMED)
    return Spelling(stem + ending, tuple(dict.fromkeys(wrappers)), adapter)


def _without_name(path: str) -> tuple[str, str]:
    """The path without the adapter's name, and that name; "" if the path has none."""
    found = _NAMED.search(path)
    if found is None or found[2] in ("weight", "bias"):
        return path, ""
    kind, name, rest = found[1], found[2], found[3] or ""
    if kind == "modules_to_save":
        return path[: found.start()] + rest, name
    if kind.startswith(_WITHOUT_WEIGHT):
        rest = ""
    return f"{path[: found.start()]}.{kind}{rest}", name


def adapters_in(spellings: Iterable[Spelling]) -> Sequence[str]:
    """The names of the adapters that a file holds, in order; none if its names have none."""
    return sorted({each.adapter for each in spellings if each.adapter})
