"""Initialisations of LoRA: some change the base, so that A and B are not the whole change."""

from __future__ import annotations

from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.strict_json import shown

PLAIN = frozenset({"eva", "gaussian", "mica", "orthogonal"})
"""Names of initialisations that leave the base unchanged, so that A and B are the whole change."""

MUTATING = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations whose adapters can be converted, by the beginnings of their names."""

_CONVERT = (
    "convert it: loraplex-server convert --from pissa --initial DIR, where DIR holds the adapter "
    "as it was before training"
)
_RETRAIN = "train it on the served base with another initialisation"


def way_out(initialisation: str) -> str:
    """Advice to the owner of an adapter whose initialisation may change the base."""
    return _CONVERT if initialisation.startswith(MUTATING) else _RETRAIN


def check_initialisation(reader: Reader) -> None:
    """Adds a finding if A and B may not be the whole change, by `init_lora_weights`."""
    value = reader.config.get("init_lora_weights")
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        reader.invalid("init_lora_weights", "is neither a boolean nor a name")
    elif value not in PLAIN:
        reader.unsupported(
            "init_lora_weights",
            f"is {shown(value)}, which may change the base, so that A and B are not the whole "
            f"change; {way_out(value)}",
        )
