"""Initialisations of LoRA: which of them leave the base as it was."""

from __future__ import annotations

from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.strict_json import shown

PLAIN = frozenset({"gaussian", "eva", "orthogonal"})
"""Initialisations by name that leave the base as it was, so that A and B are the whole delta."""

_CONVERT = (
    "convert it: loraplex-server convert --from pissa --initial DIR, where DIR holds the adapter "
    "as it was before training"
)
_RETRAIN = "train it on the served base with another initialisation"


def way_out(initialisation: str) -> str:
    """What the owner of an adapter with a base-changing initialisation can do."""
    convertible = initialisation.startswith(("pissa", "corda", "olora", "lora_ga"))
    return _CONVERT if convertible else _RETRAIN


def check_initialisation(reader: Reader) -> None:
    """Refuses `init_lora_weights` where A and B may not be the whole delta."""
    value = reader.config.get("init_lora_weights")
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        reader.invalid("init_lora_weights", "is neither a boolean nor a name")
    elif value not in PLAIN:
        reader.unsupported(
            "init_lora_weights",
            f"is {shown(value)}, which may change the base, so that A and B are not the whole "
            f"delta; {way_out(value)}",
        )
