"""Finds the copies of the base's own weights in a file, and the modules whose weights they set.

As in PEFT, a copy replaces the base's weight, and what else the adapter has at the module acts on
top. If the base ties embeddings and head, they are one parameter: a copy under either name sets
both, and of two copies the head's remains, since PEFT loads it last. A module of `modules_to_save`
has a weight of its own, so no copy reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from loraplex_model.base.config import Site

from loraplex_adapters.format.copies.names import COPY_ENDINGS, ModuleState
from loraplex_adapters.format.modules import EMBEDDING, HEAD, MATRICES, PREFIX, base_sites
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.spec import BaseCopy, ModuleSpec, TensorLocation

_VOCABULARY = (EMBEDDING, HEAD)
_PROJECTION = (
    "the base's projections are quantised and shared by all adapters, so none can be replaced; "
    "express the change as A and B, or merge it into the base and serve that"
)
_STATES = {
    ModuleState.PLAIN: "is not adapted",
    ModuleState.ADAPTED: "is adapted",
    ModuleState.SAVED: "is in modules_to_save",
    ModuleState.TOKENS: "has trained tokens",
}
_OTHER_WEIGHT = "ln_tuning_layers.weight"


def place_copies(file: Placement, modules: list[ModuleSpec]) -> list[BaseCopy]:
    """Claims the copies, adds the weights that they set to `modules`, and returns the copies.

    What is added assumes that every copy differs from the base; `settle` takes it back otherwise.
    """
    copies: list[BaseCopy] = []
    shared: list[int] = []
    for site in base_sites(file.base):
        for state, tensor in _claimed(file, site):
            if file.fits(site, {"copy": tensor}) is None:
                continue
            copy = _copy(file, site, state, tensor)
            if len(copy.sites) > 1 or (file.base.config.tie_embeddings and _sets_vocabulary(copy)):
                shared.append(len(copies))
            copies.append(copy)
    for index in shared[:-1]:
        last = copies[shared[-1]].tensor.name
        copies[index] = replace(copies[index], sites=(), replaced_by=last)
    for copy in copies:
        for site in copy.sites:
            _set_weight(modules, site, copy.tensor)
    return copies


def without_copies(
    modules: Iterable[ModuleSpec], copies: Iterable[BaseCopy]
) -> Iterator[ModuleSpec]:
    """The modules as they are if every copy equals the base."""
    copied = {site for copy in copies for site in copy.sites}
    for module in modules:
        if (module.layer, module.module) not in copied:
            yield module
            continue
        tensors = {role: t for role, t in module.tensors.items() if role != "weight"}
        if tensors:
            yield replace(module, tensors=tensors)


def _claimed(file: Placement, site: Site) -> Iterator[tuple[ModuleState, TensorLocation]]:
    for state in ModuleState:
        if (tensor := file.claim(site, f"{state.value}weight")) is not None:
            yield state, tensor


def _copy(file: Placement, site: Site, named: ModuleState, tensor: TensorLocation) -> BaseCopy:
    state = _state(file, site)
    if named is not state:
        name = f"{PREFIX}{file.path(site)}.{state.value}weight"
        refusal = f"PEFT does not load it, because the module {_STATES[state]}; if it is meant to "
        return BaseCopy(tensor, site, (), f"{refusal}replace the base's weight, name it {name}")
    if site[1] in MATRICES:
        return BaseCopy(tensor, site, (), _PROJECTION)
    tied = file.base.config.tie_embeddings and site in _VOCABULARY
    sites = _VOCABULARY if tied else (site,)
    return BaseCopy(tensor, site, tuple(s for s in sites if not _has_own_weight(file, s)))


def _sets_vocabulary(copy: BaseCopy) -> bool:
    return any(site in _VOCABULARY for site in copy.sites)


def _has_own_weight(file: Placement, site: Site) -> bool:
    return site in file.saved or _OTHER_WEIGHT in file.claimed(site)


def _state(file: Placement, site: Site) -> ModuleState:
    if site in file.saved:
        return ModuleState.SAVED
    endings = set(file.claimed(site))
    if site == HEAD and file.base.config.tie_embeddings:  # PEFT wraps the head alike
        endings |= {ending for ending in file.claimed(EMBEDDING) if "trainable_tokens" in ending}
    if any(ending.startswith("token_adapter.trainable") for ending in endings):
        return ModuleState.TOKENS
    if any(ending not in COPY_ENDINGS and ending != "bias" for ending in endings):
        return ModuleState.ADAPTED
    return ModuleState.PLAIN


def _set_weight(modules: list[ModuleSpec], site: Site, tensor: TensorLocation) -> None:
    """Adds the role "weight" to the part at a site, which may be new."""
    for index, module in enumerate(modules):
        if (module.layer, module.module) == site:
            modules[index] = replace(module, tensors={**module.tensors, "weight": tensor})
            return
    modules.append(ModuleSpec(*site, {"weight": tensor}))
