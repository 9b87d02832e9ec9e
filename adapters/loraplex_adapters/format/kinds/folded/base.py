"""The contract of kinds that fold into A and B at load, and what their readers have in common.

A `Method` is one such kind: it checks a module's tensors against the base, and states the rank of
the A and B that `load.folded` will compute from them. That rank is known from shapes alone, so it
is compared with the limit before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.copies.names import COPY_ENDINGS
from loraplex_adapters.format.files import CONFIG_FILE
from loraplex_adapters.format.kinds.whole import (
    SAVED_BIAS_ENDING,
    SAVED_OPTION,
    WRAPPED_BIAS,
    place_others,
)
from loraplex_adapters.format.modules import base_sites, linear_shape
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import Fold, ModuleSpec, TensorLocation
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import Option, ignored, served
from loraplex_adapters.format.targets import Targets

Size = int | str
"""A width in a shape: one that the base fixes, or the name of one that the file chooses."""

TARGET_OPTIONS: Mapping[str, Option] = {
    **SAVED_OPTION,
    "init_weights": ignored("initial values only"),
    "layers_pattern": served("names or expressions"),
    "layers_to_transform": served(),
    "target_modules": served("projections, lm_head; names or an expression"),
}
"""Options that every folded kind has."""

EXCLUDED_OPTION: Mapping[str, Option] = {"exclude_modules": served("names or an expression")}
TRANSPOSED_OPTION: Mapping[str, Option] = {
    "fan_in_fan_out": ignored("no served base is transposed"),
}
PATTERN_OPTIONS: Mapping[str, Option] = {
    "alpha_pattern": served("names or expressions; keys that disagree are refused"),
    "rank_pattern": served("names or expressions; keys that disagree are refused"),
}
DROPOUT = ignored("acts in training only")

ENDINGS: Mapping[str, str] = {SAVED_BIAS_ENDING: "modules_to_save", **COPY_ENDINGS}
"""Ends of tensor names that every folded kind has."""


def read_bias(reader: Reader, own: str) -> str:
    """Reads `bias`, whose word for the adapted modules' biases is `own`."""
    return reader.choice("bias", {"none": "none", "all": "all", own: own}, "none")


class Method(Protocol):
    """One kind, as far as it reads a module's own tensors.

    Attributes:
        marks: ends of the names of tensors that only an adapted module has.
    """

    @property
    def marks(self) -> Collection[str]: ...

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """Claims the tensors of the `adapted` sites, all of which are linear.

        Returns the modules that fit; adds a finding for every one that does not.
        """


@dataclass(frozen=True, slots=True)
class FoldedReading:
    """The options of a configuration of a folded kind.

    Attributes:
        bias: which biases the file has: those of no module ("none"), of "all", or of the adapted
            ones (any other word).
    """

    targets: Targets
    method: Method
    bias: str = "none"

    def place(self, file: Placement) -> list[ModuleSpec]:
        """The folded modules, then biases of other projections and saved modules."""
        adapted = file.sites(*self.method.marks)
        linear = [site for site in base_sites(file.base) if linear_shape(site, file.base)]
        others = set(adapted).difference(linear)
        for site in sorted(others):
            self._refuse(file, site)
        biases = {site: self._bias(file, site) for site in adapted}
        modules = [
            replace(module, tensors={**module.tensors, **biases[module.layer, module.module]})
            for module in self.method.modules(file, [s for s in adapted if s not in others])
        ]
        modules += place_others(file, self.targets, self.bias, {}, adapted)
        file.check_targets(self.targets, linear, adapted)
        return modules

    def _bias(self, file: Placement, site: Site) -> Mapping[str, TensorLocation]:
        if self.bias == "none" or site[1] not in file.base.config.biased:
            return {}
        tensor = file.require(site, WRAPPED_BIAS)
        if tensor is None or file.fits(site, {"bias": tensor}) is None:
            return {}
        return {"bias": tensor}

    def _refuse(self, file: Placement, site: Site) -> None:
        for ending in self.method.marks:
            if (tensor := file.claim(site, ending)) is not None:
                message = f"{shown(tensor.name)} changes {site[1]}, which is no linear module"
                file.find(Reason.ADAPTER_UNSUPPORTED, message, shown(tensor.name))


def shape_of(file: Placement, site: Site) -> tuple[int, int]:
    """Widths of the input and output of a linear module of the base."""
    shape = linear_shape(site, file.base)
    assert shape is not None, "FoldedReading gives linear sites only"
    return shape


def measured(
    file: Placement,
    site: Site,
    tensors: Mapping[str, TensorLocation | None],
    shapes: Mapping[str, tuple[Size, ...]],
    owner: str = "",
) -> Mapping[str, int] | None:
    """Checks tensors, by role, against `shapes`; returns the widths that the file chooses, by name.

    `owner` names what fixes the other widths; it is the base's module if left out.
    Returns None if a shape does not fit, which adds a finding, or if a tensor is None (missing, for
    which there is a finding already). A width of 0 does not fit.
    """
    found: dict[str, int] = {}
    if any(tensor is None for tensor in tensors.values()):
        return None
    for role, tensor in tensors.items():
        assert tensor is not None
        name, expected = shown(tensor.name), shapes[role]
        if len(tensor.shape) != len(expected):
            message = f"{name} has {len(tensor.shape)} dimensions; {len(expected)} are expected"
            file.find(Reason.ADAPTER_INVALID, message, name)
            return None
        for size, wanted in zip(tensor.shape, expected, strict=True):
            if not size:
                file.find(Reason.ADAPTER_INVALID, f"{name} has no elements", name)
                return None
            if isinstance(wanted, int):
                if size != wanted:
                    owner = owner or f"the base's {site[1]}"
                    message = f"{name} has width {size}; {owner} has {wanted}"
                    file.find(Reason.BASE_MODEL_MISMATCH, message, name)
                    return None
            elif found.setdefault(wanted, size) != size:
                message = f"{name} has width {size} where another tensor of the module has "
                file.find(Reason.ADAPTER_INVALID, f"{message}{found[wanted]}", name)
                return None
    return found


def widest(file: Placement, targets: Targets) -> tuple[int, int]:
    """The largest input and output of the target modules: the widths of shared tensors."""
    linear = [site for site in base_sites(file.base) if linear_shape(site, file.base)]
    try:
        named = targets.promised(linear, file.path)
    except ValueError:  # `check_targets` reports it
        named = frozenset(linear)
    shapes = [shape_of(file, site) for site in named] or [(0, 0)]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def states(file: Placement, site: Site, held: int, stated: int, field: str, what: str) -> bool:
    """Whether a width in the weights is the one that a field states; if not, adds a finding."""
    if held == stated:
        return True
    message = f"has {what} {held} in the weights and {stated} in {CONFIG_FILE}"
    file.find(Reason.ADAPTER_INVALID, f"{file.path(site)} {message}", field)
    return False


def folded(
    file: Placement,
    site: Site,
    arithmetic: str,
    tensors: Mapping[str, TensorLocation | None],
    rank: int,
    parts: str = "",
    *,
    scale: float = 1.0,
    settings: Mapping[str, float] | None = None,
) -> list[ModuleSpec]:
    """A module whose A and B are computed at load; empty, with a finding, if its rank is too large.

    `rank` is that of the product by the shapes of its parts; `parts` says how it comes about, such
    as "8 x 8". If it exceeds the module's smaller width, the whole change is computed at load, with
    an identity as the other factor, so the folded rank is at most that width.
    """
    fan_in, fan_out = shape_of(file, site)
    least = min(rank, fan_in, fan_out)
    if least > file.limits.max_rank:
        parts = f" ({parts})" if parts and least == rank else ""
        message = f"has folded rank {least}{parts}; at most {file.limits.max_rank} is allowed"
        first = next(shown(tensor.name) for tensor in tensors.values() if tensor is not None)
        file.find(Reason.RANK_TOO_LARGE, f"{file.path(site)} {message}", first)
        return []
    held = {role: tensor for role, tensor in tensors.items() if tensor is not None}
    fold = Fold(arithmetic, fan_in, fan_out, settings or {})
    return [ModuleSpec(*site, held, least, scale, fold=fold)]
