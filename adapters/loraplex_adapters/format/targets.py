"""The modules that a configuration names as changed, by PEFT's rules for lists and expressions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import Enum

from loraplex_model.base.config import Site

from loraplex_adapters.format.expressions.automaton import Expression
from loraplex_adapters.format.modules import EMBEDDING, HEAD, MATRICES, ModulePaths
from loraplex_adapters.format.patterns import match, suffixes

EMBEDDINGS: tuple[Site, ...] = (EMBEDDING, HEAD)
"""Sites of embeddings and head, which a base may tie."""


class Named(Enum):
    """What `target_modules` says if it is neither a list nor an expression."""

    UNKNOWN = "unknown"
    """It could not be read, for which there is a finding."""
    ALL_LINEAR = "all-linear"
    """Every linear module but the head. PEFT resolves the word when it loads the adapter, so it
    does not say which modules were trained."""


LAYERS = "model.layers"
"""Path of the list of layers, which `layers_pattern` describes."""

_BLOCKS = ("model", LAYERS, f"{LAYERS}.0", f"{LAYERS}.0.self_attn", f"{LAYERS}.0.mlp")
"""Modules above those that are adapted."""


@dataclass(frozen=True, slots=True)
class Targets:
    """`target_modules` and the options that narrow or widen it.

    Attributes:
        names: the listed names, or an expression that matches whole paths.
        excluded: names of modules that are left out, or an expression for their whole paths.
        layers: numbers of the adapted layers; None for all.
        layers_pattern: names of the list of layers, or expressions for it; empty for any.
        saved: `modules_to_save`, the modules that the file replaces completely.
        tied: `ensure_weight_tying`.
    """

    names: tuple[str, ...] | Expression | Named = Named.UNKNOWN
    excluded: tuple[str, ...] | Expression = ()
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tied: bool = False

    @property
    def known(self) -> bool:
        """Whether `promised` can be computed."""
        return self.names is not Named.UNKNOWN

    def complete(self, path: ModulePaths) -> bool:
        """Whether every promised site must have weights.

        An expression that matches blocks too, such as `.*`, says little about what was trained:
        trainers apply it to some of the modules only, and PEFT refuses it.
        """
        if isinstance(self.names, Expression):
            return not self.names.matches([path.spelt(block) for block in _BLOCKS])
        return self.names is not Named.ALL_LINEAR

    def promised(self, sites: Iterable[Site], path: ModulePaths) -> Set[Site]:
        """The `sites` that PEFT would adapt; none if `target_modules` could not be read.

        `path` gives the modules' paths. Raises ValueError if an expression takes too long to
        evaluate.
        """
        paths = {path(site): site for site in sites}
        named, excluded = self._named(paths, path.spelt(LAYERS)), _ends(self.excluded, paths)
        found = {
            site
            for name, site in paths.items()
            if name not in excluded and name in named and not self._saves(name)
        }
        return self._with_tied(found, path)

    def _named(self, paths: Mapping[str, Site], layers: str) -> Set[str]:
        if self.names is Named.UNKNOWN:
            return frozenset()
        if self.names is Named.ALL_LINEAR:
            return {path for path, site in paths.items() if site[1] in MATRICES}
        by_name = _ends(self.names, paths)
        if self.layers is None or isinstance(self.names, Expression):
            return by_name
        # A full path in the list applies whatever `layers` is.
        here = self._transformed(layers)
        return {path for path in by_name if paths[path][0] in here or path in self.names}

    def replaced(self, sites: Iterable[Site], path: ModulePaths) -> Set[Site]:
        """The `sites` that PEFT would save completely.

        It compares the ends of names as text: "norm" means every module whose name ends with it.
        """
        if not self.saved:
            return frozenset()
        found = {site for site in sites if path(site).endswith(self.saved)}
        return self._with_tied(found, path)

    def _saves(self, path: str) -> bool:
        """Whether a module is, or is within, a completely saved one, which PEFT does not adapt."""
        return any(f".{name}." in f".{path}." for name in self.saved)

    def _transformed(self, layers: str) -> Set[int]:
        """The numbers of `layers`, if `layers_pattern` describes the path of the list of layers."""
        pattern = dict.fromkeys(self.layers_pattern, 1)
        known = not pattern or layers in match(pattern, (layers,)).values
        return (self.layers or frozenset()) if known else frozenset()

    def _with_tied(self, found: set[Site], path: ModulePaths) -> Set[Site]:
        if self.tied and path.base.config.tie_embeddings and found.intersection(EMBEDDINGS):
            found.update(EMBEDDINGS)
        return frozenset(found)


def _ends(names: tuple[str, ...] | Expression, paths: Collection[str]) -> Set[str]:
    """The paths that end in one of the names, which PEFT compares as text, or that match."""
    if isinstance(names, Expression):
        return names.matches(paths)
    listed = frozenset(names)
    return {path for path in paths if not listed.isdisjoint(suffixes(path))}
