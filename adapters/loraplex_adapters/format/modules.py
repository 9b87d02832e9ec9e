"""Names of modules: PEFT's spelling of a site, and the shapes of tensors there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from loraplex_model.base import families
from loraplex_model.base.config import (
    JOINED,
    LAYER_NORMS,
    LAYER_SITES,
    MODEL,
    MODEL_SITES,
    PROJECTIONS,
    NormSpan,
    Site,
)
from loraplex_model.base.info import BaseInfo

PREFIX = "base_model.model."
"""PEFT's prefix of a module's path in the Hugging Face model."""

EMBEDDING: Site = (MODEL, "embed_tokens")
HEAD: Site = (MODEL, "lm_head")

VIRTUAL_TOKENS: Site = (MODEL, "virtual_tokens")
"""Site of an adapter's virtual tokens, which is not a module of the base."""

SHARED: Site = (MODEL, "shared")
"""Site of tensors that all modules of an adapter share, which is not a module of the base."""

BOTTLENECKS = {"attention_bottleneck": "self_attn", "mlp_bottleneck": "mlp"}
"""The block that each bottleneck is parallel to or follows."""

MATRICES = (*PROJECTIONS, *JOINED.values())
"""Names of a layer's matrices as checkpoints hold them; a base has some of them."""

EXPERT_MATRICES = ("experts_gate_up", "experts_down")
"""Names of the two parameters of a layer that have the matrices of all experts."""

NORMS = (*LAYER_NORMS, "norm")

_FIRST_PARTS = {
    "qkv_proj": "q_proj",
    "gate_up_proj": "gate_proj",
    "experts_gate_up": "gate_proj",
    "experts_down": "down_proj",
}
_EXPERT_PARAMETERS = {"experts_gate_up": "gate_up_proj", "experts_down": "down_proj"}
_ORDER: Mapping[str, int] = {
    **{name: index for index, name in enumerate(LAYER_SITES)},
    **{name: LAYER_SITES.index(part) for name, part in _FIRST_PARTS.items()},
}
"""Places of a layer's modules in the order of the adapter table, a joined one at its first part."""


@lru_cache(1 << 14)
def module_path(architecture: str, layer: int, module: str) -> str:
    """Returns the module's path in the Hugging Face model, which PEFT's patterns refer to.

    The path of a bottleneck is that of its block.
    """
    if (layer, module) == VIRTUAL_TOKENS:
        return module
    if module in BOTTLENECKS:
        return f"model.layers.{layer}.{BOTTLENECKS[module]}"
    if module in EXPERT_MATRICES:
        return f"model.layers.{layer}.mlp.experts.{_EXPERT_PARAMETERS[module]}"
    return families.module_path(architecture, layer, module)


@dataclass(frozen=True, slots=True)
class ModulePaths:
    """The paths of a base's modules as one file spells them.

    Attributes:
        text_prefix: what the file has before the paths of the text decoder, a key of
            `families.TEXT_PREFIXES`, if it was trained on the multimodal model that the base is the
            text decoder of; else "".
    """

    base: BaseInfo
    text_prefix: str = ""

    def __call__(self, site: Site) -> str:
        return self.spelt(module_path(self.base.config.architecture, *site))

    def spelt(self, path: str) -> str:
        """The path of a module of the text model as the file has it."""
        own = families.TEXT_PREFIXES.get(self.text_prefix)
        if own is None or not path.startswith(own):
            return path
        return self.text_prefix + path.removeprefix(own)

    def plain(self, path: str) -> str:
        """The path in the text model for a path in the file."""
        if not self.text_prefix or not path.startswith(self.text_prefix):
            return path if self.spelt(path) == path else ""
        return families.TEXT_PREFIXES[self.text_prefix] + path.removeprefix(self.text_prefix)


def paths_of(names: Iterable[str], base: BaseInfo) -> ModulePaths:
    """The spelling of a file whose tensors have these names."""
    if base.config.architecture in families.TEXT_FAMILIES:
        for name in names:
            for prefix in families.TEXT_PREFIXES:
                if name.startswith(PREFIX + prefix):
                    return ModulePaths(base, prefix)
    return ModulePaths(base)


def shown_modules(sites: Iterable[Site], base: BaseInfo) -> tuple[str, ...]:
    """The names of the modules at the sites as files have them, each once, in table order."""
    found: dict[str, None] = {}
    for layer, name in sorted(sites, key=lambda site: (site[0] == MODEL, table_order(site)[2])):
        if (layer, name) == VIRTUAL_TOKENS:
            continue
        path = name if name in BOTTLENECKS else module_path(base.config.architecture, layer, name)
        found[path.rpartition(".")[2]] = None
    return tuple(found)


def base_sites(base: BaseInfo) -> Iterator[Site]:
    """Every module of the base that an adapter may change, in the order of the adapter table."""
    config = base.config
    norms = [name for name in config.norm_widths() if not has_norm_for_each_head(name, base)]
    modules = {*config.module_shapes(), *norms} - config.expert_projections
    names = sorted(modules, key=_ORDER.__getitem__)
    for layer in range(config.num_layers):
        for name in names:
            yield layer, name
    for name in MODEL_SITES:
        yield MODEL, name


def has_norm_for_each_head(name: str, base: BaseInfo) -> bool:
    """Whether the norm of queries or keys is a module of its own for each head (StableLM)."""
    return "{head}" in families.module_path(base.config.architecture, 0, name)


def table_order(site: Site) -> tuple[bool, int, int]:
    """Key that sorts sites in the order of the adapter table, with virtual tokens last."""
    layer, name = site
    if layer == MODEL:
        return True, 0, (*MODEL_SITES, VIRTUAL_TOKENS[1]).index(name)
    return False, layer, _ORDER[name]


def role_shapes(site: Site, base: BaseInfo) -> Mapping[str, tuple[int | None, ...]]:
    """Returns the shape of every role that a tensor can have at a site of this base.

    None stands for the inner width: LoRA's rank, a bottleneck's width, the number of rows or of
    virtual tokens. A role that is missing cannot occur at the site.
    """
    _, name = site
    config = base.config
    hidden, vocab = config.hidden_size, config.vocab_size
    if name in MATRICES:
        fan_in, fan_out = config.module_shapes()[name]
        return {
            "a": (None, fan_in),
            "b": (fan_out, None),
            "e": (None, 1),
            "b_bias": (fan_out,),
            "magnitude": (fan_out,),
            "out_gain": (fan_out, 1),
            "in_gain": (1, fan_in),
            "bias_delta": (1, fan_out),
            "copy": (fan_out, fan_in),
            **({"bias": (fan_out,)} if name in config.biased else {}),
        }
    if name in EXPERT_MATRICES:
        part = "gate_proj" if name == "experts_gate_up" else "down_proj"
        fan_in, fan_out = config.projection_shapes()[part]
        return {"a": (None, fan_in), "b": (fan_out * (2 if part == "gate_proj" else 1), None)}
    if name in NORMS:
        shape: tuple[int, ...] = (config.norm_widths().get(name, hidden),)
        is_of_heads = name in ("q_norm", "k_norm")
        if is_of_heads and config.qk_norm_span is NormSpan.EACH:
            shape = shape[0] // config.head_dim, config.head_dim
        has_bias = config.norm_bias and not is_of_heads
        return {"weight": shape, "copy": shape, **({"bias": shape} if has_bias else {})}
    if name == "embed_tokens":
        matrices = {"a": (None, vocab), "b": (hidden, None)}
        return {**matrices, **_rows(vocab, hidden)}
    if name == "lm_head":
        matrices = {"a": (None, hidden), "b": (vocab, None), "e": (None, 1)}
        return {**matrices, **_rows(vocab, hidden)}
    if name in BOTTLENECKS:
        return {
            "down": (None, hidden),
            "down_bias": (None,),
            "up": (hidden, None),
            "up_bias": (hidden,),
        }
    return {"prompt": (None, hidden), "prefix": (None, 2 * config.num_layers * config.kv_size)}


def linear_shape(site: Site, base: BaseInfo) -> tuple[int, int] | None:
    """Widths of the input and output of a linear module; None if the site is not one."""
    shapes = role_shapes(site, base)
    if site == EMBEDDING or "a" not in shapes or "b" not in shapes:
        return None
    (_, fan_in), (fan_out, _) = shapes["a"], shapes["b"]
    assert fan_in is not None
    assert fan_out is not None
    return fan_in, fan_out


def _rows(vocab: int, hidden: int) -> Mapping[str, tuple[int | None, ...]]:
    whole = (vocab, hidden)
    return {"weight": whole, "copy": whole, "rows": (None, hidden)}
