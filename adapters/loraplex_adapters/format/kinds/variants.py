"""Variants of LORA: other forms of A and B, and other ways to train them.

BD-LoRA and QA-LoRA store a part of A or B that determines the rest, and KaSA also removes the
weakest directions of the base's weight. MiCA, VeLoRA and MonteCLoRA differ in training only, so
their A and B act as LoRA's. PEFT accepts one variant at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.folded.base import Size, folded, measured, shape_of, states
from loraplex_adapters.format.kinds.folded.patterns import Rank
from loraplex_adapters.format.modules import HEAD, linear_shape
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import Option, ignored, is_neutral, served

_SECONDS = 2e-10
"""Approximate seconds of one core for one unit of `AdapterLimits.max_decompositions`."""

MAX_PATTERNS = 64
"""Most names in each list of BD-LoRA, since every module's path is compared with all of them."""

_OF_A, _OF_B = "target_modules_bd_a", "target_modules_bd_b"

_TRAINING = "differs from LoRA in training only"
_SAMPLER = "lora_monteclora_sampler."

VARIANT_OPTIONS: Mapping[str, Option] = {
    "kasa_config": served("KaSA: folded rank 2 r, uses the served weight; projections"),
    "monteclora_config": ignored(f"MonteCLoRA {_TRAINING}"),
    "qalora_group_size": served("of use_qalora"),
    "use_bdlora": served("BD-LoRA: blocks of A or B; no embeddings"),
    "use_qalora": served("QA-LoRA: A acts on sums of groups; no embeddings"),
    "velora_config": ignored(f"VeLoRA {_TRAINING}"),
}

TRAINING_ENDINGS: Mapping[str, str] = {
    "lora_velora_embed": "velora_config",
    f"{_SAMPLER}expert_weights": "monteclora_config",
    f"{_SAMPLER}expert_weights_prior": "monteclora_config",
    f"{_SAMPLER}gaussian_var_prior": "monteclora_config",
    f"{_SAMPLER}std_prior": "monteclora_config",
}
"""Ends of names of tensors that PEFT saves and reads in training only."""

VARIANT_ENDINGS: Mapping[str, str] = {"lora_diag": "kasa_config", **TRAINING_ENDINGS}

_EXCLUSIVE = ("use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")

Tensors = Mapping[str, TensorLocation | None]


class Variant(Protocol):
    """A variant whose A and B are computed at load."""

    def has_bias(self, file: Placement, site: Site) -> bool:
        """Whether lora_B has a bias at this site if `lora_bias` is on."""

    def modules(
        self, file: Placement, site: Site, tensors: Tensors, rank: Rank
    ) -> list[ModuleSpec]:
        """The module at a linear site; empty, with a finding, if its tensors do not fit.

        `tensors` are LoRA's, by role.
        """


def place_variant(
    variant: Variant, file: Placement, site: Site, tensors: Tensors, rank: Rank
) -> list[ModuleSpec]:
    """The module of a variant at a site, which must be linear."""
    if linear_shape(site, file.base) is None:
        path = file.path(site)
        message = f"{path} is adapted by a variant of LoRA that PEFT has for linear modules only"
        file.find(Reason.ADAPTER_UNSUPPORTED, message, path)
        return []
    vectors = {role: tensors[role] for role in ("b_bias", "bias") if role in tensors}
    matrices = {role: tensor for role, tensor in tensors.items() if role not in vectors}
    if file.fits(site, vectors) is None:
        return []
    held = {role: tensor for role, tensor in vectors.items() if tensor is not None}
    return [
        replace(module, tensors={**module.tensors, **held})
        for module in variant.modules(file, site, matrices, rank)
    ]


def check_work(file: Placement, modules: Sequence[ModuleSpec]) -> None:
    """Adds a finding if the matrices that KaSA decomposes at load are too many for the limit."""
    folds = [module.fold for module in modules if module.fold and module.fold.arithmetic == "kasa"]
    work = sum(min(f.fan_in, f.fan_out) ** 2 * (f.fan_in + f.fan_out) for f in folds)
    if work <= file.limits.max_decompositions:
        return
    seconds = [_SECONDS * number for number in (work, file.limits.max_decompositions)]
    message = (
        f"KaSA needs the singular vectors of {len(folds)} of the base's matrices, which takes "
        f"about {seconds[0]:.0f} s of one core whenever it is loaded; at most {seconds[1]:.0f} s "
        "are allowed: fold it once, with loraplex-server export --format peft, and register the "
        "result"
    )
    file.find(Reason.ADAPTER_TOO_LARGE, message, "kasa_config")


def read_unused(reader: Reader) -> tuple[str, ...]:
    """The ends of names of tensors that PEFT reads in training only, by the options that are on."""
    found = TRAINING_ENDINGS.items()
    return tuple(end for end, key in found if not is_neutral(key, reader.config.get(key)))


@dataclass(frozen=True, slots=True)
class DiagonalBlocks:
    """BD-LoRA: A or B is block-diagonal, and the file has the blocks one below the other.

    Attributes:
        of_a, of_b: texts; a path that contains one of them has blocks in A, or in B.
        count: number of blocks.
        strict: whether every module must have blocks.
    """

    of_a: tuple[str, ...]
    of_b: tuple[str, ...]
    count: int
    strict: bool

    def has_bias(self, file: Placement, site: Site) -> bool:
        """PEFT's block-diagonal B has no bias."""
        return not self._matches(file, site, self.of_b)

    def modules(
        self, file: Placement, site: Site, tensors: Tensors, rank: Rank
    ) -> list[ModuleSpec]:
        """The module with its blocks."""
        fan_in, fan_out = shape_of(file, site)
        in_a, in_b = self._matches(file, site, self.of_a), self._matches(file, site, self.of_b)
        if (in_a and in_b) or (self.strict and not (in_a or in_b)):
            problem = "both lists" if in_a else "neither list, and match_strict is on"
            message = f"use_bdlora names {file.path(site)} in {problem}"
            file.find(Reason.ADAPTER_INVALID, message, "use_bdlora")
            return []
        split = fan_in if in_a else fan_out
        if (in_a or in_b) and (rank.rank % self.count or split % self.count):
            message = f"{self.count} blocks do not divide both the rank {rank.rank} and the width "
            message += f"{split} of {file.path(site)}"
            file.find(Reason.ADAPTER_INVALID, message, "use_bdlora")
            return []
        a, b = self.count if in_a else 1, self.count if in_b else 1
        shapes: dict[str, tuple[Size, ...]] = {"a": ("r", "in"), "b": (fan_out, "columns")}
        held = measured(file, site, tensors, shapes)
        if held is None or not states(file, site, held["r"], rank.rank, rank.field, "rank"):
            return []
        expected = {"in": fan_in // a, "columns": rank.rank // b}
        for name, role in (("in", "a"), ("columns", "b")):
            tensor = tensors[role]
            if held[name] != expected[name] and tensor is not None:
                message = f"{shown(tensor.name)} has width {held[name]}; use_bdlora and the base's "
                message += f"{site[1]} need {expected[name]}"
                file.find(Reason.ADAPTER_INVALID, message, shown(tensor.name))
                return []
        settings = {"blocks_a": float(a), "blocks_b": float(b)}
        return folded(file, site, "bdlora", tensors, rank.rank, scale=rank.scale, settings=settings)

    def _matches(self, file: Placement, site: Site, texts: tuple[str, ...]) -> bool:
        path = file.path(site)
        return any(text in path for text in texts)


@dataclass(frozen=True, slots=True)
class PooledGroups:
    """QA-LoRA: A acts on the means of groups of `size` inputs, times the number of groups.

    PEFT does so for bases in GPTQ's format, and ignores the option on others. The width of A shows
    which of the two the file was trained on.
    """

    size: int

    def has_bias(self, file: Placement, site: Site) -> bool:
        """As in LoRA."""
        return True

    def modules(
        self, file: Placement, site: Site, tensors: Tensors, rank: Rank
    ) -> list[ModuleSpec]:
        """The module, with one column of A for each group, or for each input."""
        fan_in, fan_out = shape_of(file, site)
        a = tensors.get("a")
        grouped = a is not None and a.shape[-1:] != (fan_in,)
        if grouped and fan_in % self.size:
            message = f"qalora_group_size is {self.size}, which does not divide the width {fan_in} "
            message += f"of {file.path(site)}"
            file.find(Reason.BASE_MODEL_MISMATCH, message, "qalora_group_size")
            return []
        size = self.size if grouped else 1
        shapes: dict[str, tuple[Size, ...]] = {"a": ("r", fan_in // size), "b": (fan_out, "r")}
        held = measured(file, site, tensors, shapes)
        if held is None or not states(file, site, held["r"], rank.rank, rank.field, "rank"):
            return []
        factor = fan_in / size / size if grouped else 1.0
        settings = {"size": float(size), "factor": factor}
        return folded(file, site, "qalora", tensors, rank.rank, scale=rank.scale, settings=settings)


@dataclass(frozen=True, slots=True)
class TruncatedBase:
    """KaSA: B diag(d) A, without the r directions of the base's weight that are weakest."""

    def has_bias(self, file: Placement, site: Site) -> bool:
        """As in LoRA."""
        return True

    def modules(
        self, file: Placement, site: Site, tensors: Tensors, rank: Rank
    ) -> list[ModuleSpec]:
        """The module; its folded rank is 2 r."""
        fan_in, fan_out = shape_of(file, site)
        every = {**tensors, "lora_diag": file.require(site, "lora_diag")}
        shapes: dict[str, tuple[Size, ...]] = {
            "a": ("r", fan_in),
            "b": (fan_out, "r"),
            "lora_diag": ("r",),
        }
        held = measured(file, site, every, shapes)
        if held is None or not states(file, site, held["r"], rank.rank, rank.field, "rank"):
            return []
        path = file.path(site)
        if site == HEAD:
            message = (
                f"{path} is adapted by KaSA, which changes the head's own weight in the file; "
                "train it without the head"
            )
            file.find(Reason.ADAPTER_UNSUPPORTED, message, path)
            return []
        if rank.rank >= min(fan_in, fan_out):
            message = f"{path} has rank {rank.rank}; KaSA needs less than its smaller width, "
            file.find(Reason.ADAPTER_INVALID, f"{message}{min(fan_in, fan_out)}", rank.field)
            return []
        if abs(rank.scale) < _LEAST_SCALE:
            message = f"{path} has scale {rank.scale:g}; KaSA is served from {_LEAST_SCALE:g} on"
            file.find(Reason.ADAPTER_UNSUPPORTED, message, "lora_alpha")
            return []
        parts = f"2 x {rank.rank}"
        return folded(file, site, "kasa", every, 2 * rank.rank, parts, scale=rank.scale)


_LEAST_SCALE = 1e-6
"""The removed directions are divided by the scale, which multiplies them again."""


def read_variant(reader: Reader) -> Variant | None:
    """The variant of a configuration; None for one that acts as LoRA does."""
    found = [key for key in _EXCLUSIVE if not is_neutral(key, reader.config.get(key))]
    if reader.config.get("init_lora_weights") == "mica":
        found.append("init_lora_weights")
    if len(found) > 1:
        reader.unsupported(found[1], f"is set together with {found[0]}, which PEFT does not load")
    if "kasa_config" in found:
        _map(reader, "kasa_config")
        return TruncatedBase()
    if "use_bdlora" in found:
        return _read_blocks(reader)
    if reader.flag("use_qalora"):
        size = reader.config.get("qalora_group_size")
        return PooledGroups(16 if size is None else reader.integer("qalora_group_size") or 1)
    return None


def _read_blocks(reader: Reader) -> Variant | None:
    key = "use_bdlora"
    options = _map(reader, key)
    lists: dict[str, tuple[str, ...]] = {}
    for name in (_OF_A, _OF_B):
        texts = options.get(name) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            reader.invalid(key, f"has {name}, which is not a list of names")
            return None
        if len(texts) > MAX_PATTERNS:
            reader.unsupported(key, f"has more than {MAX_PATTERNS} names in {name}")
            return None
        lists[name] = tuple(texts)
    strict = options.get("match_strict", True)
    count = reader.as_integer(key, options.get("nblocks", 1))
    if not isinstance(strict, bool):
        reader.invalid(key, "has match_strict, which is not a boolean")
    known = {_OF_A, _OF_B, "match_strict", "nblocks"}
    if unknown := sorted(options.keys() - known):
        reader.unsupported(key, f"has the unknown key {shown(unknown[0])}")
    return (
        None if count is None else DiagonalBlocks(lists[_OF_A], lists[_OF_B], count, bool(strict))
    )


def _map(reader: Reader, key: str) -> Mapping[str, object]:
    value = reader.config.get(key)
    if isinstance(value, dict):
        return value
    reader.invalid(key, "is not a map")
    return {}
