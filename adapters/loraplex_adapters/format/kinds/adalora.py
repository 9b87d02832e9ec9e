"""ADALORA: y += alpha / (init_r + 1e-5) * B (E * A x), with a rank for each module.

PEFT divides by the initial rank, however much of it was pruned, and ignores `r`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.files import WEIGHTS_FILE
from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.initialisation import check_initialisation
from loraplex_adapters.format.kinds.lora import (
    BIASES,
    SHARED_ENDINGS,
    SHARED_OPTIONS,
    adaptable,
    claim_extras,
)
from loraplex_adapters.format.kinds.whole import TokenRows, place_others, read_rows
from loraplex_adapters.format.modules import EMBEDDING
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import ignored, refused, served
from loraplex_adapters.format.targets import Targets

_FACTORS = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
_MARK = ".lora_E"
_UNUSED = "PEFT ignores it for this type"
_SCHEDULE = ("beta1", "beta2", "deltaT", "target_r", "tfinal", "tinit", "total_step")


@dataclass(frozen=True, slots=True)
class AdaLoraReading:
    """The options of an ADALORA configuration.

    Attributes:
        kept: rank after pruning by module path; other modules have rank `init_r`.
        bias: "none", "all" or "lora_only".
        rows: the trained token rows.
    """

    init_r: int
    lora_alpha: float
    targets: Targets
    kept: Mapping[str, int] = field(default_factory=dict)
    bias: str = "none"
    rows: TokenRows = field(default_factory=dict)

    def place(self, file: Placement) -> list[ModuleSpec]:
        """Modules with a rank above 0, then biases, saved modules and trained rows."""
        file.check_rank("init_r", self.init_r)
        scale = self.lora_alpha / (self.init_r + 1e-5)
        adapted = file.sites(*_FACTORS.values())
        if unknown := sorted(self.kept.keys() - {file.path(site) for site in adapted}):
            message = f"rank_pattern names {shown(unknown[0])}, which has no weights"
            file.find(Reason.ADAPTER_INVALID, message, "rank_pattern")
        modules = []
        for site in adapted:
            file.check_scale(site, scale, "lora_alpha")
            tensors = {role: file.require(site, end) for role, end in _FACTORS.items()}
            claim_extras(file, site, self.bias, tensors)
            rank, field_name = self._rank(file.path(site))
            held = file.of_rank(site, tensors, rank, field_name) or {}
            if not rank:
                held = {role: tensor for role, tensor in held.items() if role not in _FACTORS}
            if held:
                modules.append(ModuleSpec(*site, held, rank, scale))
        modules += place_others(file, self.targets, self.bias, self.rows, adapted)
        candidates = [site for site in adaptable(file) if site != EMBEDDING]
        file.check_targets(self.targets, candidates, adapted)
        if not modules and not file.findings:
            message = "every module was pruned to rank 0: the adapter changes nothing"
            file.find(Reason.ADAPTER_INVALID, message, WEIGHTS_FILE)
        return modules

    def _rank(self, path: str) -> tuple[int, str]:
        if path in self.kept:
            return self.kept[path], "rank_pattern"
        return self.init_r, "init_r"


def _read_kept(reader: Reader, init_r: int) -> dict[str, int]:
    """Reads `rank_pattern`, which masks the `init_r` singular values; returns the ranks kept."""
    kept = {}
    for name, mask in reader.pattern("rank_pattern", lambda _, value: (value,)).items():
        values = mask[0]
        if not name.endswith(_MARK):
            reader.invalid("rank_pattern", f"has the key {shown(name)}, which is not a lora_E")
        elif not isinstance(values, list) or not all(isinstance(v, bool) for v in values):
            reader.invalid("rank_pattern", f"has no list of booleans for {shown(name)}")
        elif len(values) != init_r:
            reader.invalid("rank_pattern", f"has {len(values)} booleans for {shown(name)}")
        else:
            kept[name.removesuffix(_MARK)] = sum(values)
    return kept


def _read(reader: Reader) -> AdaLoraReading | None:
    init_r = reader.integer("init_r")
    alpha = reader.number("lora_alpha")
    if alpha is not None and alpha <= 0:
        # PEFT then scales each module by the rank that it has at load.
        reader.unsupported("lora_alpha", "is not above 0")
    reading = AdaLoraReading(
        init_r=init_r or 1,
        lora_alpha=alpha or 0.0,
        targets=reader.targets(),
        kept=_read_kept(reader, init_r or 0),
        bias=reader.choice("bias", BIASES, "none"),
        rows=read_rows(reader),
    )
    check_initialisation(reader)
    return None if init_r is None or alpha is None else reading


ADALORA = Kind(
    peft_type="ADALORA",
    summary="AdaLoRA: ranks differ by module, down to 0",
    options={
        **SHARED_OPTIONS,
        **dict.fromkeys(_SCHEDULE, ignored("acts in training only")),
        "orth_reg_weight": ignored("acts in training only"),
        "alpha_pattern": ignored(_UNUSED),
        "init_r": served("scale is alpha / (init_r + 1e-5)"),
        "lora_bias": ignored(_UNUSED),
        "r": ignored(_UNUSED),
        "rank_pattern": served("masks of the singular values that were kept"),
        "use_dora": refused("DoRA"),
        "use_rslora": ignored(_UNUSED),
    },
    endings={
        "lora_A": "",
        "lora_B": "",
        "lora_E": "",
        **SHARED_ENDINGS,
    },
    read=_read,
)
