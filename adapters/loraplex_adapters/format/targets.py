"""The modules that a configuration names as changed, by PEFT's rules for lists of names."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from loraplex_model.base.config import Site
from loraplex_model.base.info import BaseInfo

from loraplex_adapters.format.modules import EMBEDDING, HEAD, module_path
from loraplex_adapters.format.patterns import suffixes

EMBEDDINGS: tuple[Site, ...] = (EMBEDDING, HEAD)
"""Sites of embeddings and head, which a base may tie."""


@dataclass(frozen=True, slots=True)
class Targets:
    """`target_modules` and the options that narrow or widen it.

    Attributes:
        names: the listed names; None if the file has a regular expression.
        excluded: names of modules that are left out.
        layers: numbers of the adapted layers; None for all.
        layers_pattern: names of the list of layers; empty for any.
        saved: `modules_to_save`, the modules that the file replaces completely.
        tied: `ensure_weight_tying`.
    """

    names: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tied: bool = False

    def promised(self, sites: Iterable[Site], base: BaseInfo) -> Set[Site]:
        """The `sites` that PEFT would adapt by the list of names; none if there is no list."""
        targets, excluded = frozenset(self.names or ()), frozenset(self.excluded)
        found = set()
        for site in sites:
            path = module_path(*site)
            names = suffixes(path)
            # A full path in the list applies whatever `layers` is.
            by_name = self._transforms(site[0]) and not targets.isdisjoint(names)
            taken = by_name or path in targets
            if taken and excluded.isdisjoint(names) and not self._saves(path):
                found.add(site)
        return self._with_tied(found, base)

    def replaced(self, sites: Iterable[Site], base: BaseInfo) -> Set[Site]:
        """The `sites` that PEFT would save completely.

        It compares the ends of names as text: "norm" means every module whose name ends with it.
        """
        if not self.saved:
            return frozenset()
        found = {site for site in sites if module_path(*site).endswith(self.saved)}
        return self._with_tied(found, base)

    def _saves(self, path: str) -> bool:
        """Whether a module is, or is within, a completely saved one, which PEFT does not adapt."""
        return any(f".{name}." in f".{path}." for name in self.saved)

    def _transforms(self, layer: int) -> bool:
        if self.layers is None:
            return True
        if self.layers_pattern and not {"layers", "model.layers"} & set(self.layers_pattern):
            return False
        return layer in self.layers

    def _with_tied(self, found: set[Site], base: BaseInfo) -> Set[Site]:
        if self.tied and base.config.tie_embeddings and found.intersection(EMBEDDINGS):
            found.update(EMBEDDINGS)
        return frozenset(found)
