"""The supported kinds of adapters, one table each; `base` is their contract."""

from __future__ import annotations

from collections.abc import Mapping

from loraplex_adapters.format.kinds.adalora import ADALORA
from loraplex_adapters.format.kinds.base import Kind, Reading
from loraplex_adapters.format.kinds.bottleneck import BOTTLENECK
from loraplex_adapters.format.kinds.folded import FOLDED
from loraplex_adapters.format.kinds.lora import LORA
from loraplex_adapters.format.kinds.multitask import MULTITASK_PROMPT_TUNING
from loraplex_adapters.format.kinds.tokens import TRAINABLE_TOKENS
from loraplex_adapters.format.kinds.vectors import BEFT, IA3, LN_TUNING
from loraplex_adapters.format.kinds.virtual import (
    CARTRIDGE,
    CPT,
    P_TUNING,
    PREFIX_TUNING,
    PROMPT_TUNING,
)

KINDS: Mapping[str, Kind] = {
    kind.peft_type: kind
    for kind in (
        LORA,
        ADALORA,
        IA3,
        BEFT,
        LN_TUNING,
        TRAINABLE_TOKENS,
        PROMPT_TUNING,
        P_TUNING,
        CPT,
        MULTITASK_PROMPT_TUNING,
        PREFIX_TUNING,
        CARTRIDGE,
        BOTTLENECK,
        *FOLDED,
    )
}
"""Every kind by `peft_type`."""

__all__ = ["KINDS", "Kind", "Reading"]
