"""The names of modules and tensors: PEFT's spelling of them, and ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass

from loraplex_model.config import PROJECTIONS

from loraplex_adapters.config import LoraSettings
from loraplex_adapters.patterns import suffixes
from loraplex_adapters.spec import BaseShapes

PREFIX = "base_model.model."
"""What PEFT puts before a module's path in the Hugging Face model."""

BLOCKS = {
    name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    for name in PROJECTIONS
}
"""The part of a decoder layer that each projection lies in."""

Place = tuple[int, str]
"""A module: (layer, name of the projection)."""

_LORA_KEY = re.compile(
    r"\Abase_model\.model\.model\.layers\.(0|[1-9][0-9]{0,4})\."
    r"(self_attn|mlp)\.([a-z_]{1,32})\.lora_([AB])\.weight\Z"
)

_OTHER_KINDS = (
    ("lora_magnitude_vector", "DoRA magnitudes"),
    ("lora_embedding_", "LoRA on the embeddings"),
    ("trainable_tokens_delta", "trained token embeddings"),
    ("prompt_embeddings", "virtual tokens"),
    ("ia3_l", "IA3"),
    ("base_layer.", "weights of the base itself"),
    ("lora_B.bias", "a bias beside lora_B"),
    (".lm_head.", "a change to lm_head"),
    (".embed_tokens.", "a change to the embeddings"),
    ("norm.weight", "a change to a norm"),
)


@dataclass(frozen=True, slots=True)
class LoraKey:
    """A tensor name that was understood; `half` is "A" or "B"."""

    layer: int
    block: str
    module: str
    half: str


def parse_key(name: str) -> LoraKey | None:
    """Reads `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` and its like."""
    found = _LORA_KEY.match(name)
    return LoraKey(int(found[1]), found[2], found[3], found[4]) if found else None


def other_kind(name: str) -> str | None:
    """What a tensor that is no LoRA half seems to be, where PEFT has a name for it."""
    return next((meaning for mark, meaning in _OTHER_KINDS if mark in name), None)


def module_path(layer: int, module: str) -> str:
    """The module's path in the Hugging Face model, which PEFT's patterns are matched with."""
    return f"model.layers.{layer}.{BLOCKS[module]}.{module}"


def promised(settings: LoraSettings, base: BaseShapes) -> Set[Place]:
    """The modules of the base that PEFT would adapt for a list of target modules."""
    return frozenset(_promised(settings, base))


def _promised(settings: LoraSettings, base: BaseShapes) -> Iterator[Place]:
    targets = frozenset(settings.target_modules or ())
    excluded = frozenset(settings.exclude_modules)
    for layer in range(base.num_layers):
        chosen = _transforms(settings, layer)
        for module in base.projections:
            path = module_path(layer, module)
            names = frozenset(suffixes(path))
            # A full path in the list holds whatever the choice of layers says.
            if (path in targets or (chosen and names & targets)) and not names & excluded:
                yield layer, module


def _transforms(settings: LoraSettings, layer: int) -> bool:
    if settings.layers_to_transform is None:
        return True
    if settings.layers_pattern and not {"layers", "model.layers"} & set(settings.layers_pattern):
        return False
    return layer in settings.layers_to_transform
