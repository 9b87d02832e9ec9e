"""The projections of the base that a method changes, by name, and their weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from loraplex_adapters.format import modules
from loraplex_adapters.format.modules import MATRICES
from loraplex_adapters.format.patterns import match, suffixes
from loraplex_model.adapters.merge import own_matrix
from loraplex_model.base.config import MODEL, PROJECTIONS, Site
from loraplex_model.base.names import suggest
from loraplex_model.base.weights import BaseWeights
from loraplex_model.ops import unpack

from loraplex_training.methods.options import OptionProblems, TargetOptions

Number = TypeVar("Number", int, float)

HEAD: Site = (MODEL, "lm_head")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

GROUPS: Mapping[str, tuple[str, ...]] = {
    "all-linear": PROJECTIONS,
    "attention": ATTENTION,
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "qv": ("q_proj", "v_proj"),
}
"""Names for several modules at once. A module that a base holds as a part of a larger one stands
for the larger one."""


def module_path(base: BaseWeights, site: Site) -> str:
    """A module's path in the base's Hugging Face model, as PEFT's files name it."""
    return modules.module_path(base.config.architecture, *site)


def sites_of(
    options: TargetOptions, base: BaseWeights, problems: OptionProblems, head: bool = False
) -> tuple[Site, ...]:
    """The projections that the options name, in the order of the model.

    A name is a word of `GROUPS`, or a module's path or the end of one: "q_proj",
    "self_attn.q_proj", "layers.1.self_attn.q_proj". With `head` the output head may be named, too;
    no word for several modules includes it. A name that matches no module is a problem.
    """
    count = base.config.num_layers
    layers = range(count) if options.layers is None else options.layers
    if beyond := [layer for layer in layers if layer >= count]:
        text = f"layers: there is no layer {beyond[0]}; the base has 0 to {count - 1}"
        problems.add("layers", text)
        layers = range(count)
    names = [name for name in MATRICES if name in trainable(base)]
    sites = [(layer, name) for layer in layers for name in names]
    sites += [HEAD] if head else []
    chosen: set[Site] = set()
    for name in options.target_modules:
        found = [site for site in sites if _names(name, site, base)]
        if not found:
            problems.add("target_modules", f"target_modules: {_nothing(name, base, head)}")
        chosen.update(found)
    return tuple(site for site in sites if site in chosen)


def trainable(base: BaseWeights) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each of the checkpoint's matrices in a layer, but not of experts."""
    experts = base.config.expert_projections
    shapes = base.config.module_shapes().items()
    return {name: shape for name, shape in shapes if name not in experts}


def by_site(
    name: str,
    pattern: Mapping[str, Number],
    sites: Collection[Site],
    base: BaseWeights,
    problems: OptionProblems,
) -> dict[Site, Number]:
    """The numbers that the option `name` has for some of `sites`.

    Keys are ends of module paths, as in PEFT's patterns. A key that names none of the sites is a
    problem, and so are two keys with different values for one site.
    """
    pattern = dict(pattern)
    paths = {module_path(base, site): site for site in sites}
    endings = {ending for path in paths for ending in suffixes(path)}
    for key in [key for key in pattern if key not in endings]:
        near = suggest(key, endings)
        problems.add(name, f"{name}: {key!r} names none of the target modules{near}")
        del pattern[key]
    matched = match(pattern, paths)
    if matched.conflict is not None:
        path, one, other = matched.conflict
        text = f"{name}: {one!r} and {other!r} both name {path}, with different values"
        problems.add(name, text)
    return {paths[path]: value for path, value in matched.values.items()}


def shape(base: BaseWeights, site: Site) -> tuple[int, int]:
    """Returns a module's numbers of inputs and outputs."""
    if site == HEAD:
        vocab, hidden = base.lm_head.shape
        return hidden, vocab
    return base.config.module_shapes()[site[1]]


def weight(base: BaseWeights, site: Site) -> torch.Tensor:
    """Unpacks a matrix of the checkpoint: a new float32 tensor [out, in] on the base's device."""
    return unpack.dequantize(own_matrix(base, site))


def _names(name: str, site: Site, base: BaseWeights) -> bool:
    if name in GROUPS:
        return site != HEAD and not {*base.config.parts_of(site[1])}.isdisjoint(GROUPS[name])
    return name in suffixes(module_path(base, site))


def _nothing(name: str, base: BaseWeights, head: bool) -> str:
    first = next(iter(trainable(base)))
    example = module_path(base, (0, first))
    own = [module_path(base, (0, each)).rpartition(".")[2] for each in trainable(base)]
    known = [*own, *GROUPS, *([HEAD[1]] if head else [])]
    hint = suggest(name, known)
    return (
        f"no module in the chosen layers (of 0 to {base.config.num_layers - 1}) is called "
        f"{name!r}{hint}; there are {', '.join(known)}, and paths such as {example}"
    )
