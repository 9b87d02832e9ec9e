"""Which of the base's projections a method changes, by name, and their weights."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

import torch
from loraplex_adapters.format.modules import BLOCKS, module_path
from loraplex_adapters.format.patterns import match, suffixes
from loraplex_model.adapters.merge import fused_matrix
from loraplex_model.base.config import FUSED, MODEL, PROJECTIONS, Site
from loraplex_model.base.weights import BaseWeights, NF4Matrix
from loraplex_model.ops import nf4, unpack

from loraplex_training.methods.options import Options

HEAD: Site = (MODEL, "lm_head")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

GROUPS: Mapping[str, tuple[str, ...]] = {
    "all-linear": PROJECTIONS,
    "attention": ATTENTION,
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "qv": ("q_proj", "v_proj"),
}
"""Words for several modules."""


def read_sites(
    options: Options,
    base: BaseWeights,
    default: str = "all-linear",
    allowed: Collection[str] = PROJECTIONS,
    head: bool = False,
) -> tuple[Site, ...]:
    """The projections that `target_modules` and `layers` name, in the order of the model; with
    `head` also the output head, if it is named: no word for several modules includes it.

    A name is a word of `GROUPS`, or a module's path or the end of one: "q_proj",
    "self_attn.q_proj", "layers.1.self_attn.q_proj". Notes a problem for every name without module.
    """
    names = options.names("target_modules", default.split(","))
    count = base.config.num_layers
    layers = options.integers("layers", range(count))
    if beyond := [layer for layer in layers if layer >= count]:
        options.refuse(f"layers: there is no layer {beyond[0]}; the base has 0 to {count - 1}")
        layers = tuple(range(count))
    sites = [(layer, name) for layer in layers for name in PROJECTIONS if name in allowed]
    sites += [HEAD] if head else []
    chosen: set[Site] = set()
    for name in names:
        found = [site for site in sites if _names(name, site)]
        if not found:
            options.refuse(f"target_modules: {_nothing(name, base, allowed, head)}")
        chosen.update(found)
    return tuple(site for site in sites if site in chosen)


def read_pattern(
    options: Options, name: str, sites: Collection[Site], whole: bool = False
) -> dict[Site, float]:
    """Numbers above 0 for some of `sites`, by the end of a module's path, as PEFT's patterns have.

    Notes keys that name none of the sites, and sites that two keys disagree about.
    """
    pattern = options.mapping(name, whole)
    paths = {module_path(*site): site for site in sites}
    endings = {ending for path in paths for ending in suffixes(path)}
    for key in [key for key in pattern if key not in endings]:
        near = difflib.get_close_matches(key, endings, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        options.refuse(f"{name}: {key!r} names none of the target modules{hint}")
        del pattern[key]
    matched = match(pattern, paths)
    if matched.conflict is not None:
        path, one, other = matched.conflict
        options.refuse(f"{name}: {one!r} and {other!r} both name {path}, with different values")
    return {paths[path]: value for path, value in matched.values.items()}


def shape(base: BaseWeights, site: Site) -> tuple[int, int]:
    """A module's inputs and outputs."""
    if site == HEAD:
        vocab, hidden = base.lm_head.shape
        return hidden, vocab
    return base.config.projection_shapes()[site[1]]


def matrix(base: BaseWeights, site: Site) -> NF4Matrix:
    """A projection's NF4 weights, as views of the base's."""
    fused, index = _place(site)
    return nf4.split(fused_matrix(base.layers[site[0]], fused)[0])[index]


def weight(base: BaseWeights, site: Site) -> torch.Tensor:
    """A projection's weights as they are served: new float32 [out, in] on the base's device."""
    return unpack.dequantize(matrix(base, site))


def bias(base: BaseWeights, site: Site) -> torch.Tensor | None:
    """A projection's bias [out] in the base's type, if it has one."""
    fused, index = _place(site)
    stack, biases = fused_matrix(base.layers[site[0]], fused)
    return None if biases is None else torch.split(biases, list(stack.rows))[index]


def _place(site: Site) -> tuple[str, int]:
    """The fused matrix that holds a projection, and which of its parts that is."""
    fused = next(fused for fused, names in FUSED.items() if site[1] in names)
    return fused, FUSED[fused].index(site[1])


def _names(name: str, site: Site) -> bool:
    return site[1] in GROUPS[name] if name in GROUPS else name in suffixes(module_path(*site))


def _nothing(name: str, base: BaseWeights, allowed: Collection[str], head: bool) -> str:
    known = [*(module for module in PROJECTIONS if module in allowed), *GROUPS]
    known += [HEAD[1]] if head else []
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    example = f"model.layers.0.{BLOCKS[known[0]]}.{known[0]}"
    return (
        f"no module in the chosen layers (of 0 to {base.config.num_layers - 1}) is called "
        f"{name!r}{hint}; there are {', '.join(known)}, and paths such as {example}"
    )
