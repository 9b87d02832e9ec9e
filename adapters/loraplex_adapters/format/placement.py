"""Assigns every tensor of a weights file to a site of the base, or reports why it fits none.

A kind claims the tensors that its configuration accounts for. A tensor that is unclaimed at the end
becomes a finding, so no tensor can be dropped by mistake.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Set

from loraplex_model.base.config import JOINED, Site
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason

from loraplex_adapters.format.copies.names import SPELLINGS
from loraplex_adapters.format.files import CONFIG_FILE
from loraplex_adapters.format.header import Header
from loraplex_adapters.format.modules import (
    BOTTLENECKS,
    PREFIX,
    SHARED,
    VIRTUAL_TOKENS,
    base_sites,
    has_norm_for_each_head,
    module_path,
    paths_of,
    role_shapes,
)
from loraplex_adapters.format.patterns import Value, match
from loraplex_adapters.format.spec import AdapterLimits, ModuleSpec, TensorLocation
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.targets import Targets

_EXPERTS = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.mlp\.experts(\.base_layer)?")
_EXPERT_FACTOR = re.compile(
    r"\.layers\.(0|[1-9][0-9]{0,4})\.mlp\.experts\.(base_layer\.)?lora_([AB])\.weight\Z"
)
_LAYER = re.compile(r"\Amodel\.layers\.(0|[1-9][0-9]{0,4})\.")
_HEAD_NORM = re.compile(r"_layernorm\.norms\.[0-9]{1,5}\Z")


class Placement:
    """Placement of one file's tensors in one base.

    Attributes:
        base, limits: the base and the limits that the file is checked against.
        path: gives the path of the module at a site, as the file spells it.
        findings: everything that does not fit, in order of discovery.
        saved: the sites whose weights the file replaces completely (`modules_to_save`).
        twins: pairs of tensors that name one weight, and must be equal.
        invocation_tokens: as in `CheckedAdapter`; set by the kind.
    """

    def __init__(
        self,
        peft_type: str,
        header: Header,
        endings: Mapping[str, str],
        base: BaseInfo,
        limits: AdapterLimits,
        whole_names: bool = False,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        self.base = base
        self.limits = limits
        self.path = paths_of((tensor.name for tensor in header.tensors), base)
        self.findings: list[Problem] = []
        self.saved: set[Site] = set()
        self.twins: list[tuple[TensorLocation, TensorLocation]] = []
        self.invocation_tokens: tuple[int, ...] = ()
        self._peft_type = peft_type
        self._shared = shared or {}
        self._needs = {**endings, **self._shared}
        # The longest ending first, since "lora_B.bias" also ends in "bias".
        spelt = [other for other, ending in SPELLINGS.items() if ending in endings]
        self._endings = sorted([*endings, *spelt], key=len, reverse=True)
        own, layers = base.config.architecture, range(base.config.num_layers)
        bottlenecks = [(layer, name) for layer in layers for name in BOTTLENECKS]
        self._sites = {module_path(own, *s): s for s in (*base_sites(base), *bottlenecks)}
        self._outer_experts = _down_experts(header, base)
        self._left: dict[Site, dict[str, TensorLocation]] = {}
        self._claimed: dict[Site, set[str]] = {}
        for tensor in header.tensors:
            if whole_names:
                self._take_whole(tensor)
            elif tensor.name in self._shared:
                self._left.setdefault(SHARED, {})[tensor.name] = tensor
            else:
                self._take(tensor)

    def sites(self, *endings: str) -> list[Site]:
        """The sites that have an unclaimed tensor with one of these endings."""
        return [site for site, held in self._left.items() if held.keys() & set(endings)]

    def claim(self, site: Site, ending: str) -> TensorLocation | None:
        """Claims and returns a tensor; None if the file has none at this site with this ending."""
        tensor = self._left.get(site, {}).pop(ending, None)
        if tensor is not None:
            self._claimed.setdefault(site, set()).add(ending)
        return tensor

    def claimed(self, site: Site) -> Set[str]:
        """The endings of the tensors at a site that were claimed."""
        return self._claimed.get(site, frozenset())

    def require(self, site: Site, ending: str) -> TensorLocation | None:
        """Claims a tensor as `claim` does; adds a finding if it is missing."""
        tensor = self.claim(site, ending)
        if tensor is None:
            whole = site in (VIRTUAL_TOKENS, SHARED)
            name = ending if whole else f"{PREFIX}{self.path(site)}.{ending}"
            self.find(Reason.ADAPTER_INVALID, f"{name} is missing", name)
        return tensor

    def fits(self, site: Site, tensors: Mapping[str, TensorLocation | None]) -> int | None:
        """Checks the shapes of a site's tensors, by role, and returns their common inner width.

        Returns 0 if no role has an inner width, and None if a shape does not fit, which adds a
        finding, or if a tensor is None (missing, for which there is a finding already).
        """
        shapes = role_shapes(site, self.base)
        inner: dict[str, int] = {}
        for role, tensor in tensors.items():
            if tensor is None:
                return None
            if role not in shapes:
                self._no_role(site, role, tensor)
                return None
            expected = shapes[role]
            if len(tensor.shape) != len(expected):
                name = shown(tensor.name)
                message = f"{name} has {len(tensor.shape)} dimensions; {len(expected)} are expected"
                self.find(Reason.ADAPTER_INVALID, message, name)
                return None
            for size, wanted in zip(tensor.shape, expected, strict=True):
                if wanted is None:
                    inner[tensor.name] = size
                elif size != wanted:
                    name = shown(tensor.name)
                    message = f"{name} has width {size}; the base's {site[1]} has {wanted}"
                    self.find(Reason.BASE_MODEL_MISMATCH, message, name)
                    return None
        if len(set(inner.values())) > 1:
            sizes = " and ".join(f"{size} in {_ending(name)}" for name, size in inner.items())
            name = shown(list(inner)[-1])
            message = f"{self.path(site)} has different inner widths: {sizes}"
            self.find(Reason.ADAPTER_INVALID, message, name)
            return None
        return next(iter(inner.values()), 0)

    def single(self, site: Site, ending: str, role: str) -> list[ModuleSpec]:
        """The part with one tensor at a site; empty, with a finding, if it is missing or unfit."""
        tensor = self.require(site, ending)
        if tensor is None or self.fits(site, {role: tensor}) is None:
            return []
        return [ModuleSpec(*site, {role: tensor})]

    def of_rank(
        self, site: Site, tensors: Mapping[str, TensorLocation | None], rank: int, field: str
    ) -> dict[str, TensorLocation] | None:
        """Returns the tensors if they fit and have the rank that `field` states; else None.

        If they do not, there is a finding.
        """
        held = self.fits(site, tensors)
        if held is None:
            return None
        if held > self.limits.max_rank:
            message = f"has rank {held}; at most {self.limits.max_rank} is allowed"
            first = next(t for t in tensors.values() if t is not None)
            self.find(Reason.RANK_TOO_LARGE, f"{self.path(site)} {message}", shown(first.name))
            return None
        if held != rank:
            message = f"has rank {held} in the weights and {rank} in {CONFIG_FILE}"
            self.find(Reason.ADAPTER_INVALID, f"{self.path(site)} {message}", field)
            return None
        return {role: tensor for role, tensor in tensors.items() if tensor is not None}

    def check_rank(self, field: str, rank: int) -> None:
        """Adds a finding if a rank in the configuration is too large, whatever the tensors have."""
        if rank > self.limits.max_rank:
            message = f"{field} is rank {rank}; at most {self.limits.max_rank} is allowed"
            self.find(Reason.RANK_TOO_LARGE, message, field)

    def check_scale(self, site: Site, scale: float, field: str) -> None:
        """Adds a finding if a scale is too large or not a number."""
        if not abs(scale) <= self.limits.max_scale:
            message = f"has scale {scale:g}; at most {self.limits.max_scale:g} is allowed"
            self.find(Reason.ADAPTER_INVALID, f"{self.path(site)} {message}", field)

    def matched(
        self, field: str, pattern: Mapping[str, Value], sites: Collection[Site]
    ) -> Mapping[Site, Value]:
        """Returns the values that a pattern in the configuration gives to the sites."""
        paths = {self.path(site): site for site in sites}
        try:
            matched = match(pattern, paths)
        except ValueError as error:
            self.find(Reason.ADAPTER_UNSUPPORTED, f"{field} {error}", field)
            return {}
        if matched.conflict:
            path, first, second = matched.conflict
            message = (
                f"{field} gives {path} two values, by {first} and by {second}; the one used in "
                "training depends on an order that PEFT does not save"
            )
            self.find(Reason.ADAPTER_UNSUPPORTED, message, field)
        return {paths[path]: value for path, value in matched.values.items()}

    def check_targets(
        self, targets: Targets, candidates: Iterable[Site], adapted: Collection[Site]
    ) -> None:
        """Compares the adapted sites with the sites that PEFT would adapt by `target_modules`.

        PEFT itself ignores tensors that it does not name, and sets missing ones to zero.
        """
        if not targets.known or self.findings:
            return
        try:
            expected = targets.promised(candidates, self.path)
        except ValueError as error:
            message = f"an expression for modules {error}; list the modules' names"
            self.find(Reason.ADAPTER_UNSUPPORTED, message, "target_modules")
            return
        if unnamed := sorted(set(adapted) - expected):
            message = f"{self.path(unnamed[0])} has weights but is not among the target modules"
            self.find(Reason.ADAPTER_INVALID, message, "target_modules")
        if (missing := sorted(expected - set(adapted))) and targets.complete(self.path):
            message = f"{self.path(missing[0])} is a target but has no weights"
            if missing[0][0] > max((layer for layer, _ in adapted), default=-1) >= 0:
                message += "; the adapter seems to be for a base with fewer layers"
                self.find(Reason.BASE_MODEL_MISMATCH, message, "target_modules")
            else:
                self.find(Reason.ADAPTER_INVALID, message, "target_modules")

    def finish(self) -> None:
        """Adds a finding for every unclaimed tensor."""
        for held in self._left.values():
            for ending, tensor in held.items():
                name = shown(tensor.name)
                option = self._needs[ending]
                why = f" ({option})" if option else ""
                message = f"{name} is in the file, but {CONFIG_FILE} does not use it{why}"
                self.find(Reason.ADAPTER_INVALID, message, name)
        self._left.clear()

    def find(self, reason: Reason, message: str, field: str) -> None:
        """Adds a finding."""
        self.findings.append(Problem(field, message, reason))

    def _take_whole(self, tensor: TensorLocation) -> None:
        if tensor.name in self._needs:
            self._left.setdefault(VIRTUAL_TOKENS, {})[tensor.name] = tensor
        else:
            self._no_tensor(tensor)

    def _take(self, tensor: TensorLocation) -> None:
        rest = tensor.name.removeprefix(PREFIX)
        ending = next((e for e in self._endings if rest.endswith(f".{e}")), None)
        if ending is None or rest == tensor.name:
            self._no_tensor(tensor)
            return
        path = self.path.plain(rest[: -len(ending) - 1])
        site = self._sites.get(path) or self._expert_site(path)
        if site is None:
            self._no_site(tensor, path)
            return
        ending = SPELLINGS.get(ending, ending)
        first = self._left.setdefault(site, {}).setdefault(ending, tensor)
        if first is not tensor:
            self.twins.append((first, tensor))

    def _expert_site(self, path: str) -> Site | None:
        """The site of a path that ends at a wrapper of a layer's experts.

        The inner one of two is that of gate and up.
        """
        found = _EXPERTS.fullmatch(path)
        if found is None or int(found[1]) >= self.base.config.num_layers:
            return None
        if not self.base.config.num_experts:
            return None
        if found[2]:
            return int(found[1]), "experts_gate_up"
        is_down = found[1] in self._outer_experts
        return int(found[1]), "experts_down" if is_down else "experts_gate_up"

    def _no_tensor(self, tensor: TensorLocation) -> None:
        name = shown(tensor.name)
        message = f"{name} is not a tensor of an adapter of type {self._peft_type}"
        self.find(Reason.ADAPTER_INVALID, message, name)

    def _no_site(self, tensor: TensorLocation, path: str) -> None:
        if self._within_module(path):
            self._no_tensor(tensor)
            return
        name = shown(tensor.name)
        message = f"{name} belongs to no module of this base"
        found = _LAYER.match(path)
        if found and int(found[1]) >= self.base.config.num_layers:
            message = f"{name} is beyond the base's {self.base.config.num_layers} layers"
        elif found and (other := self._other_form(path)):
            message = f"{name} {other}"
        elif found and _HEAD_NORM.search(path) and has_norm_for_each_head("q_norm", self.base):
            message = f"{name} changes the norm of a single head, which is not supported"
            self.find(Reason.ADAPTER_UNSUPPORTED, message, name)
            return
        self.find(Reason.BASE_MODEL_MISMATCH, message, name)

    def _other_form(self, path: str) -> str:
        """How the checkpoint that a module is of differs from this base's; "" if it does not.

        Some families hold several projections as one module, and conversions of them divide it.
        """
        config, last = self.base.config, path.rpartition(".")[2]
        for fused, joined in JOINED.items():
            parts = config.fused[fused]
            listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
            if last in parts and fused in config.joined:
                return (
                    f"is of a checkpoint that divides {joined}; this base holds {listed} as one "
                    f"module: serve the checkpoint that the adapter was trained on"
                )
            if last == joined and fused not in config.joined and len(parts) > 1:
                return (
                    f"is of a checkpoint that joins {listed}; this base holds them as modules of "
                    f"their own: serve the checkpoint that the adapter was trained on"
                )
        return ""

    def _within_module(self, path: str) -> bool:
        """Whether the path leads into a module of the base, so that only its end is unknown."""
        parts = path.split(".")
        above = (self._sites.get(".".join(parts[:n])) for n in range(1, min(len(parts), 8)))
        return any(site is not None and site[1] not in BOTTLENECKS for site in above)

    def _no_role(self, site: Site, role: str, tensor: TensorLocation) -> None:
        name = shown(tensor.name)
        if role == "bias":
            message = f"{name} replaces a bias; the base's {site[1]} has none"
            self.find(Reason.BASE_MODEL_MISMATCH, message, name)
        else:
            message = f"{name} changes {site[1]} in a way that is not supported"
            self.find(Reason.ADAPTER_UNSUPPORTED, message, name)


def _down_experts(header: Header, base: BaseInfo) -> frozenset[str]:
    """The layers whose outer wrapper of experts is that of their down projections.

    That is so if there is an inner one, or if the widths of A and B are those of `down`.
    """
    config = base.config
    if not config.num_experts:
        return frozenset()
    inner: set[str] = set()
    widths: dict[str, dict[str, int]] = {}
    for tensor in header.tensors:
        found = _EXPERT_FACTOR.search(tensor.name)
        if found and found[2]:
            inner.add(found[1])
        elif found and len(tensor.shape) == 2:
            width = tensor.shape[1 if found[3] == "A" else 0]
            widths.setdefault(found[1], {})[found[3]] = width
    down = {"A": config.intermediate_size, "B": config.hidden_size}
    return frozenset(inner | {layer for layer, found in widths.items() if found == down})


def _ending(name: str) -> str:
    return shown(name.removesuffix(".weight").rpartition(".")[2])
