"""LORA: y += scale * B (A x), with DoRA's magnitudes, trained biases, head and embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_model.base.config import Site

from loraplex_adapters.format.copies.names import COPY_ENDINGS
from loraplex_adapters.format.kinds.activation import (
    INVOCATION_OPTION,
    MAX_INVOCATION_TOKENS,
    place_invocation,
    read_invocation,
)
from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.experts import (
    PARAMETERS_OPTION,
    check_parameters,
    expert_module,
    read_parameters,
)
from loraplex_adapters.format.kinds.folded.patterns import Rank
from loraplex_adapters.format.kinds.initialisation import check_initialisation
from loraplex_adapters.format.kinds.variants import (
    VARIANT_ENDINGS,
    VARIANT_OPTIONS,
    Variant,
    check_work,
    place_variant,
    read_unused,
    read_variant,
)
from loraplex_adapters.format.kinds.whole import (
    BIAS_ENDINGS,
    ROWS_ENDING,
    ROWS_OPTION,
    SAVED_OPTION,
    WRAPPED_BIAS,
    TokenRows,
    place_others,
    read_rows,
)
from loraplex_adapters.format.modules import EMBEDDING, EXPERT_MATRICES, MATRICES, base_sites
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation
from loraplex_adapters.format.support import Option, ignored, refused, served
from loraplex_adapters.format.targets import EMBEDDINGS, Targets

SHARED_ENDINGS: Mapping[str, str] = {
    **BIAS_ENDINGS,
    **COPY_ENDINGS,
    ROWS_ENDING: ROWS_OPTION,
}
"""Ends of tensor names that LORA and ADALORA have in common."""

SHARED_OPTIONS: Mapping[str, Option] = {
    **SAVED_OPTION,
    "alora_invocation_tokens": refused("activated LoRA"),
    "arrow_config": refused("Arrow routing"),
    "bias": served("none, all, lora_only"),
    "corda_config": refused("CorDA, whose initialisation changes the base"),
    "ensure_weight_tying": served("both tensors are in the file"),
    "eva_config": ignored("settings of an initialisation that leaves the base unchanged"),
    "exclude_modules": served("names or an expression"),
    "fan_in_fan_out": ignored("A and B are stored alike, and no served base is transposed"),
    "init_lora_weights": served(
        "plain ones; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA are refused with advice"
    ),
    "kasa_config": refused("KaSA"),
    "layer_replication": refused("replicated layers"),
    "layers_pattern": served("names or expressions"),
    "layers_to_transform": served(),
    "loftq_config": refused("LoftQ, whose initialisation changes the base"),
    "lora_alpha": served(),
    "lora_dropout": ignored("acts in training only"),
    "lora_ga_config": refused("LoRA-GA, whose initialisation changes the base"),
    "megatron_config": refused("Megatron layers"),
    "megatron_core": ignored(),
    "monteclora_config": refused("MonteCLoRA"),
    "qalora_group_size": ignored("has an effect with use_qalora only"),
    "target_modules": served("projections, lm_head, embed_tokens; names or an expression"),
    "target_parameters": refused("targets that are parameters instead of modules"),
    "trainable_token_indices": served("embeddings and head, tied or not"),
    "use_bdlora": refused("block-diagonal LoRA"),
    "use_qalora": refused("QA-LoRA"),
    "velora_config": refused("VeLoRA"),
}
"""Options that LORA and ADALORA have in common."""

BIASES = {"none": "none", "all": "all", "lora_only": "lora_only"}


@dataclass(frozen=True, slots=True)
class LoraReading:
    """The options of a LORA configuration.

    Attributes:
        rank_pattern, alpha_pattern: by plain module name or dotted suffix, in the file's order.
        bias: "none", "all" or "lora_only".
        rows: the trained token rows.
        invocation_tokens: as in `CheckedAdapter`.
        parameters: names of the experts' parameters to adapt.
        variant: how A and B are computed; None if they are in the file.
        unused: ends of names of tensors that are read in training only.
    """

    r: int
    lora_alpha: float
    targets: Targets
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    rows: TokenRows = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    variant: Variant | None = None
    unused: tuple[str, ...] = ()

    def place(self, file: Placement) -> list[ModuleSpec]:
        """LoRA's modules, then biases of other projections, saved modules and trained rows."""
        file.check_rank("r", self.r)
        if self.rank_pattern:
            file.check_rank("rank_pattern", max(self.rank_pattern.values()))
        adapted = file.sites(*_FACTORS)
        ranks = file.matched("rank_pattern", self.rank_pattern, adapted)
        alphas = file.matched("alpha_pattern", self.alpha_pattern, adapted)
        modules = []
        for site in adapted:
            rank = ranks.get(site, self.r)
            alpha = alphas.get(site, self.lora_alpha)
            scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            file.check_scale(site, scale, "alpha_pattern" if site in alphas else "lora_alpha")
            field_name = "rank_pattern" if site in ranks else "r"
            claimed = self._claim(file, site)
            if site[1] in EXPERT_MATRICES:
                modules += expert_module(file, site, claimed, rank, scale, field_name)
                continue
            if self.variant is not None:
                stated = Rank(rank, field_name, scale)
                modules += place_variant(self.variant, file, site, claimed, stated)
                continue
            tensors = file.of_rank(site, claimed, rank, field_name)
            if tensors is not None:
                modules.append(ModuleSpec(*site, tensors, rank, scale))
        check_work(file, modules)
        modules += place_others(file, self.targets, self.bias, self.rows, adapted)
        modular = [site for site in adapted if site[1] not in EXPERT_MATRICES]
        if modular or not self.parameters:
            file.check_targets(self.targets, adaptable(file), modular)
        check_parameters(file, self.parameters, adapted)
        place_invocation(file, self.invocation_tokens, adapted)
        return modules

    def _claim(self, file: Placement, site: Site) -> dict[str, TensorLocation | None]:
        a, b = ("lora_A.weight", "lora_B.weight") if site != EMBEDDING else _EMBEDDING_FACTORS
        tensors = {"a": file.require(site, a), "b": file.require(site, b)}
        if self.lora_bias and (self.variant is None or self.variant.has_bias(file, site)):
            tensors["b_bias"] = file.require(site, "lora_B.bias")
        if self.use_dora:
            tensors["magnitude"] = file.require(site, "lora_magnitude_vector")
        claim_extras(file, site, self.bias, tensors)
        for ending in self.unused:
            file.claim(site, ending)
        return tensors


_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
_FACTORS = ("lora_A.weight", "lora_B.weight", *_EMBEDDING_FACTORS)


def adaptable(file: Placement) -> list[Site]:
    """The modules of the base that LoRA can adapt."""
    return [s for s in base_sites(file.base) if s[1] in MATRICES or s in EMBEDDINGS]


def claim_extras(
    file: Placement, site: Site, bias: str, tensors: dict[str, TensorLocation | None]
) -> None:
    """Adds a projection's trained bias to `tensors`."""
    if bias != "none" and site[1] in file.base.config.biased:
        tensors["bias"] = file.require(site, WRAPPED_BIAS)


def _read(reader: Reader) -> LoraReading | None:
    rank = reader.integer("r")
    alpha = reader.number("lora_alpha")
    reading = LoraReading(
        r=rank or 1,
        lora_alpha=alpha or 0.0,
        targets=reader.targets(),
        use_rslora=reader.flag("use_rslora"),
        use_dora=reader.flag("use_dora"),
        lora_bias=reader.flag("lora_bias"),
        rank_pattern=reader.pattern("rank_pattern", reader.as_integer),
        alpha_pattern=reader.pattern("alpha_pattern", reader.as_number),
        bias=reader.choice("bias", BIASES, "none"),
        rows=read_rows(reader),
        invocation_tokens=read_invocation(reader),
        parameters=read_parameters(reader),
        variant=read_variant(reader),
        unused=read_unused(reader),
    )
    check_initialisation(reader)
    if reading.use_dora and reading.lora_bias:
        reader.unsupported("lora_bias", "is on together with use_dora, which PEFT cannot train")
    return None if rank is None or alpha is None else reading


LORA = Kind(
    peft_type="LORA",
    summary="LoRA, rsLoRA, DoRA, activated LoRA, BD-LoRA, KaSA, QA-LoRA, MiCA",
    options={
        **SHARED_OPTIONS,
        **VARIANT_OPTIONS,
        PARAMETERS_OPTION: served("gate_up_proj and down_proj of a mixture's experts"),
        INVOCATION_OPTION: served(
            f"activated LoRA, at most {MAX_INVOCATION_TOKENS} tokens; not together with DoRA or "
            "other variants, bias, modules_to_save, trained tokens or LoRA on the embeddings"
        ),
        "alpha_pattern": served("names or expressions; keys that disagree are refused"),
        "lora_bias": served("projections"),
        "r": served(),
        "rank_pattern": served("names or expressions; keys that disagree are refused"),
        "use_dora": served("projections; norms of the served weight"),
        "use_rslora": served("scale is alpha / sqrt(r)"),
    },
    endings={
        "lora_A.weight": "",
        "lora_B.weight": "",
        "lora_embedding_A": "",
        "lora_embedding_B": "",
        "lora_B.bias": "lora_bias",
        "lora_magnitude_vector": "use_dora",
        **VARIANT_ENDINGS,
        **SHARED_ENDINGS,
    },
    read=_read,
)
