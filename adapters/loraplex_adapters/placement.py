"""Puts every tensor of a weights file into its place in the base model, or says why it has none."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from loraplex_model.config import PROJECTIONS

from loraplex_adapters.config import FINGERPRINT_KEY, LoraSettings
from loraplex_adapters.errors import Finding
from loraplex_adapters.files import CONFIG_FILE
from loraplex_adapters.modules import (
    BLOCKS,
    PREFIX,
    Place,
    module_path,
    other_kind,
    parse_key,
    promised,
)
from loraplex_adapters.patterns import Value, match
from loraplex_adapters.safetensors_header import Header
from loraplex_adapters.spec import BaseShapes, Limits, ModuleSpec, TensorLocation
from loraplex_adapters.strict_json import shown


def place(
    header: Header, settings: LoraSettings, base: BaseShapes, limits: Limits
) -> tuple[tuple[ModuleSpec, ...], list[Finding]]:
    """The modules in the order of (layer, projection), and everything that does not fit."""
    placement = _Placement(settings, base, limits)
    placement.check_stamps(header.metadata)
    placement.check_declared_ranks()
    for tensor in header.tensors:
        placement.take(tensor)
    modules = placement.modules()
    placement.check_targets()
    return modules, placement.findings


class _Placement:
    """One file's way into one base; `place` says in which order the methods are called."""

    def __init__(self, settings: LoraSettings, base: BaseShapes, limits: Limits) -> None:
        self.settings = settings
        self.base = base
        self.limits = limits
        self.findings: list[Finding] = []
        self.pairs: dict[Place, dict[str, TensorLocation]] = {}

    def check_stamps(self, metadata: Mapping[str, str]) -> None:
        for stamp in (self.settings.base_fingerprint, metadata.get(FINGERPRINT_KEY, "")):
            if stamp and stamp != self.base.fingerprint:
                message = (
                    f"the adapter was made for the base {shown(stamp)}, "
                    f"this is {self.base.fingerprint}"
                )
                self.find("BASE_MODEL_MISMATCH", message, FINGERPRINT_KEY)

    def check_declared_ranks(self) -> None:
        declared = {"r": self.settings.r}
        if self.settings.rank_pattern:
            declared["rank_pattern"] = max(self.settings.rank_pattern.values())
        for field, rank in declared.items():
            if rank > self.limits.max_rank:
                message = f"{field} asks for rank {rank}; at most {self.limits.max_rank} is served"
                self.find("RANK_TOO_LARGE", message, field)

    def take(self, tensor: TensorLocation) -> None:
        """Puts a tensor to its module, where it has one."""
        name = shown(tensor.name)
        key = parse_key(tensor.name)
        if key is None:
            kind = other_kind(tensor.name)
            if kind:
                self.find("ADAPTER_UNSUPPORTED", f"{name} holds {kind}, which is not served", name)
            elif tensor.name.startswith(PREFIX) and ".lora_" in tensor.name:
                self.find("BASE_MODEL_MISMATCH", f"{name} belongs to no module of this base", name)
            else:
                self.find("ADAPTER_INVALID", f"{name} is no tensor of a LoRA adapter", name)
        elif BLOCKS.get(key.module) != key.block or key.module not in self.base.projections:
            self.find("BASE_MODEL_MISMATCH", f"{name} belongs to no module of this base", name)
        elif key.layer >= self.base.num_layers:
            message = f"{name} is beyond the base's {self.base.num_layers} layers"
            self.find("BASE_MODEL_MISMATCH", message, name)
        elif len(tensor.shape) != 2:
            self.find("ADAPTER_INVALID", f"{name} is no matrix", name)
        else:
            self.pairs.setdefault((key.layer, key.module), {})[key.half] = tensor

    def modules(self) -> tuple[ModuleSpec, ...]:
        """The modules that fit, with the rank and the scale that the configuration gives them."""
        paths = {module_path(*place): place for place in self.pairs}
        ranks = self.matched("rank_pattern", self.settings.rank_pattern, paths)
        alphas = self.matched("alpha_pattern", self.settings.alpha_pattern, paths)
        found = []
        for path, (layer, name) in paths.items():
            rank = ranks.get(path, self.settings.r)
            alpha = alphas.get(path, self.settings.lora_alpha)
            scale = alpha / (math.sqrt(rank) if self.settings.use_rslora else rank)
            if not abs(scale) <= self.limits.max_scale:
                field = "alpha_pattern" if path in alphas else "lora_alpha"
                message = f"{path} has scale {scale:g}; at most {self.limits.max_scale:g} is served"
                self.find("ADAPTER_INVALID", message, field)
            pair = self.pairs[layer, name]
            if self.fits(path, name, pair, rank, "rank_pattern" if path in ranks else "r"):
                found.append(ModuleSpec(layer, name, rank, scale, pair["A"], pair["B"]))
        found.sort(key=lambda m: (m.layer, PROJECTIONS.index(m.module)))
        return tuple(found)

    def matched(
        self, field: str, pattern: Mapping[str, Value], paths: Collection[str]
    ) -> Mapping[str, Value]:
        try:
            matched = match(pattern, paths)
        except ValueError as error:
            self.find("ADAPTER_UNSUPPORTED", f"{field} {error}", field)
            return {}
        if matched.conflict:
            path, first, second = matched.conflict
            message = (
                f"{field} gives {path} two values, by {first} and by {second}; which one it was "
                "trained with depends on an order that PEFT does not save"
            )
            self.find("ADAPTER_UNSUPPORTED", message, field)
        return matched.values

    def fits(
        self, path: str, module: str, pair: Mapping[str, TensorLocation], rank: int, field: str
    ) -> bool:
        """Whether both halves are there and have the shapes of this base and of `rank`."""
        for half in "AB":
            if half not in pair:
                name = f"{PREFIX}{path}.lora_{half}.weight"
                self.find("ADAPTER_INVALID", f"{name} is missing", name)
                return False
        a, b = pair["A"], pair["B"]
        fan_in, fan_out = self.base.projections[module]
        for tensor, width, expected in ((a, a.shape[1], fan_in), (b, b.shape[0], fan_out)):
            if width != expected:
                message = f"{tensor.name} is {width} wide; the base's {module} has {expected}"
                self.find("BASE_MODEL_MISMATCH", message, tensor.name)
                return False
        held = a.shape[0]
        if held != b.shape[1]:
            message = f"{path} has {held} rows in lora_A and {b.shape[1]} columns in lora_B"
            self.find("ADAPTER_INVALID", message, b.name)
        elif held > self.limits.max_rank:
            message = f"{path} has rank {held}; at most {self.limits.max_rank} is served"
            self.find("RANK_TOO_LARGE", message, a.name)
        elif held != rank:
            message = f"{path} has rank {held} in the weights and {rank} in {CONFIG_FILE}"
            self.find("ADAPTER_INVALID", message, field)
        else:
            return True
        return False

    def check_targets(self) -> None:
        """Holds the tensors against a list of targets, as PEFT would apply it to this base.

        PEFT passes over tensors that the list does not name, and starts the missing ones at zero.
        """
        if self.settings.target_modules is None or self.findings:
            return
        expected = promised(self.settings, self.base)
        if unnamed := sorted(self.pairs.keys() - expected):
            message = f"{module_path(*unnamed[0])} has weights but is not among the target modules"
            self.find("ADAPTER_INVALID", message, "target_modules")
        if missing := sorted(expected - self.pairs.keys()):
            message = f"{module_path(*missing[0])} is a target but has no weights"
            if missing[0][0] > max(layer for layer, _ in self.pairs):
                message += "; the adapter seems to be made for a base with fewer layers"
                self.find("BASE_MODEL_MISMATCH", message, "target_modules")
            else:
                self.find("ADAPTER_INVALID", message, "target_modules")

    def find(self, reason: str, message: str, field: str) -> None:
        self.findings.append(Finding(reason, message, field))
