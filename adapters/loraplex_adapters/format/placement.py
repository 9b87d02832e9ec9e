"""Puts every tensor of a weights file to a site of the base, or says why it has none.

A kind claims the tensors that its configuration explains. What nobody has claimed at the end is a
finding, so no tensor can be left out by mistake.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from loraplex_model.base.config import Site
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason

from loraplex_adapters.format.files import CONFIG_FILE
from loraplex_adapters.format.header import Header
from loraplex_adapters.format.modules import (
    BOTTLENECKS,
    PREFIX,
    VIRTUAL_TOKENS,
    base_sites,
    module_path,
    role_shapes,
)
from loraplex_adapters.format.patterns import Value, match
from loraplex_adapters.format.spec import AdapterLimits, TensorLocation
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.targets import Targets

_LAYER = re.compile(r"\Amodel\.layers\.(0|[1-9][0-9]{0,4})\.")


class Placement:
    """One file's way into one base.

    Attributes:
        base, limits: what the file is held against.
        findings: everything that does not fit, in the order in which it was seen.
    """

    def __init__(
        self,
        peft_type: str,
        header: Header,
        endings: Mapping[str, str],
        base: BaseInfo,
        limits: AdapterLimits,
        whole_names: bool = False,
    ) -> None:
        self.base = base
        self.limits = limits
        self.findings: list[Problem] = []
        self._peft_type = peft_type
        self._needs = endings
        # The longest first: "lora_B.bias" ends in "bias".
        self._endings = sorted(endings, key=len, reverse=True)
        self._sites = {module_path(*site): site for site in base_sites(base)}
        for layer in range(base.config.num_layers):
            for name in BOTTLENECKS:
                self._sites[module_path(layer, name)] = (layer, name)
        self._left: dict[Site, dict[str, TensorLocation]] = {}
        for tensor in header.tensors:
            if whole_names:
                self._take_whole(tensor)
            else:
                self._take(tensor)

    def sites(self, *endings: str) -> list[Site]:
        """The sites that hold an unclaimed tensor with one of these endings."""
        return [site for site, held in self._left.items() if held.keys() & set(endings)]

    def claim(self, site: Site, ending: str) -> TensorLocation | None:
        """Takes a tensor out of the file, where it is there."""
        return self._left.get(site, {}).pop(ending, None)

    def require(self, site: Site, ending: str) -> TensorLocation | None:
        """As `claim`; a tensor that is not there is a finding."""
        tensor = self.claim(site, ending)
        if tensor is None:
            name = ending if site == VIRTUAL_TOKENS else f"{PREFIX}{module_path(*site)}.{ending}"
            self.find(Reason.ADAPTER_INVALID, f"{name} is missing", name)
        return tensor

    def fits(self, site: Site, tensors: Mapping[str, TensorLocation | None]) -> int | None:
        """The inner width that all of the site's tensors share, if their shapes are the base's.

        None, with findings, where they are not; 0 where no role has an inner width. Tensors that
        are None are missing, which is a finding of its own.
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
                    message = f"{name} is {size} wide; the base's {site[1]} has {wanted}"
                    self.find(Reason.BASE_MODEL_MISMATCH, message, name)
                    return None
        if len(set(inner.values())) > 1:
            sizes = " and ".join(f"{size} in {_ending(name)}" for name, size in inner.items())
            name = shown(list(inner)[-1])
            message = f"{module_path(*site)} has inner widths that differ: {sizes}"
            self.find(Reason.ADAPTER_INVALID, message, name)
            return None
        return next(iter(inner.values()), 0)

    def fits_rank(
        self, site: Site, tensors: Mapping[str, TensorLocation | None], rank: int, field: str
    ) -> bool:
        """As `fits`, for tensors whose inner width `field` of the configuration says."""
        held = self.fits(site, tensors)
        if held is None:
            return False
        if held > self.limits.max_rank:
            message = f"has rank {held}; at most {self.limits.max_rank} is served"
            first = next(t for t in tensors.values() if t is not None)
            self.find(Reason.RANK_TOO_LARGE, f"{module_path(*site)} {message}", shown(first.name))
            return False
        if held != rank:
            message = f"has rank {held} in the weights and {rank} in {CONFIG_FILE}"
            self.find(Reason.ADAPTER_INVALID, f"{module_path(*site)} {message}", field)
            return False
        return True

    def check_rank(self, field: str, rank: int) -> None:
        """Refuses a rank of the configuration that is too large, whatever the tensors say."""
        if rank > self.limits.max_rank:
            message = f"{field} asks for rank {rank}; at most {self.limits.max_rank} is served"
            self.find(Reason.RANK_TOO_LARGE, message, field)

    def check_scale(self, site: Site, scale: float, field: str) -> None:
        """Refuses a scale that is too large."""
        if not abs(scale) <= self.limits.max_scale:
            message = f"has scale {scale:g}; at most {self.limits.max_scale:g} is served"
            self.find(Reason.ADAPTER_INVALID, f"{module_path(*site)} {message}", field)

    def matched(
        self, field: str, pattern: Mapping[str, Value], sites: Collection[Site]
    ) -> Mapping[Site, Value]:
        """What a pattern of the configuration says of each site."""
        paths = {module_path(*site): site for site in sites}
        try:
            matched = match(pattern, paths)
        except ValueError as error:
            self.find(Reason.ADAPTER_UNSUPPORTED, f"{field} {error}", field)
            return {}
        if matched.conflict:
            path, first, second = matched.conflict
            message = (
                f"{field} gives {path} two values, by {first} and by {second}; which one it was "
                "trained with depends on an order that PEFT does not save"
            )
            self.find(Reason.ADAPTER_UNSUPPORTED, message, field)
        return {paths[path]: value for path, value in matched.values.items()}

    def check_targets(
        self, targets: Targets, candidates: Iterable[Site], adapted: Collection[Site]
    ) -> None:
        """Holds the adapted sites against a list of targets, as PEFT would apply it to this base.

        PEFT passes over tensors that the list does not name, and starts the missing ones at zero.
        """
        if targets.names is None or self.findings:
            return
        expected = targets.promised(candidates, self.base)
        if unnamed := sorted(set(adapted) - expected):
            message = f"{module_path(*unnamed[0])} has weights but is not among the target modules"
            self.find(Reason.ADAPTER_INVALID, message, "target_modules")
        if missing := sorted(expected - set(adapted)):
            message = f"{module_path(*missing[0])} is a target but has no weights"
            if missing[0][0] > max((layer for layer, _ in adapted), default=-1) >= 0:
                message += "; the adapter seems to be made for a base with fewer layers"
                self.find(Reason.BASE_MODEL_MISMATCH, message, "target_modules")
            else:
                self.find(Reason.ADAPTER_INVALID, message, "target_modules")

    def finish(self) -> None:
        """Turns every tensor that nobody has claimed into a finding."""
        for held in self._left.values():
            for ending, tensor in held.items():
                name = shown(tensor.name)
                option = self._needs[ending]
                why = f" ({option})" if option else ""
                message = f"{name} is there, but {CONFIG_FILE} does not account for it{why}"
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
        path = rest[: -len(ending) - 1]
        site = self._sites.get(path)
        if site is None:
            self._no_site(tensor, path)
        else:
            self._left.setdefault(site, {})[ending] = tensor

    def _no_tensor(self, tensor: TensorLocation) -> None:
        name = shown(tensor.name)
        message = f"{name} is no tensor of an adapter of type {self._peft_type}"
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
        self.find(Reason.BASE_MODEL_MISMATCH, message, name)

    def _within_module(self, path: str) -> bool:
        """Whether the path goes on below a module of the base: then the module is not in doubt."""
        parts = path.split(".")
        above = (self._sites.get(".".join(parts[:n])) for n in range(1, min(len(parts), 8)))
        return any(site is not None and site[1] not in BOTTLENECKS for site in above)

    def _no_role(self, site: Site, role: str, tensor: TensorLocation) -> None:
        name = shown(tensor.name)
        if role == "bias":
            message = f"{name} replaces a bias; the base's {site[1]} has none"
            self.find(Reason.BASE_MODEL_MISMATCH, message, name)
        else:
            message = f"{name} changes {site[1]} in a way that is not served"
            self.find(Reason.ADAPTER_UNSUPPORTED, message, name)


def _ending(name: str) -> str:
    return shown(name.removesuffix(".weight").rpartition(".")[2])
