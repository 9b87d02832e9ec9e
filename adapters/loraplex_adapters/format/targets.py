"""Which modules a configuration says it changes, by PEFT's rules for lists of names."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from loraplex_model.base.config import MODEL, Site
from loraplex_model.base.info import BaseInfo

from loraplex_adapters.format.modules import module_path
from loraplex_adapters.format.patterns import suffixes

EMBEDDINGS: tuple[Site, ...] = ((MODEL, "embed_tokens"), (MODEL, "lm_head"))
"""The two matrices that a base may tie."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What `target_modules` and its companions name.

    Attributes:
        names: the listed names; None where the file has a regular expression.
        excluded: names that are left out.
        layers: None takes all.
        layers_pattern: names of the layer list; empty takes any.
        saved: `modules_to_save`: modules that the file replaces as a whole.
        tied: `ensure_weight_tying`.
    """

    names: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tied: bool = False

    def promised(self, sites: Iterable[Site], base: BaseInfo) -> Set[Site]:
        """Those of `sites` that PEFT would adapt; only where there is a list of names."""
        targets, excluded = frozenset(self.names or ()), frozenset(self.excluded)
        found = set()
        for site in sites:
            path = module_path(*site)
            names = suffixes(path)
            # A full path in the list holds whatever the choice of layers says.
            by_name = self._transforms(site[0]) and not targets.isdisjoint(names)
            taken = by_name or path in targets
            if taken and excluded.isdisjoint(names) and not self._saves(path):
                found.add(site)
        return self._with_tied(found, base)

    def replaced(self, sites: Iterable[Site], base: BaseInfo) -> Set[Site]:
        """Those of `sites` that PEFT would save as a whole.

        It compares the ends of the names as text: "norm" takes every module whose name ends so.
        """
        if not self.saved:
            return frozenset()
        found = {site for site in sites if module_path(*site).endswith(self.saved)}
        return self._with_tied(found, base)

    def _saves(self, path: str) -> bool:
        """Whether a module is, or lies in, one that is saved as a whole: PEFT adapts none such."""
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
