"""Names of tensors that PEFT loads and does not write today, or writes for the base's own weights.

The names are those of PEFT 0.21; `tests/adapters/test_peft_names.py` loads every one with PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

SPELLINGS: Mapping[str, str] = {
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_magnitude_vector.default.weight": "lora_magnitude_vector",
}
"""Other ends of names that mean the same, by the end that PEFT writes. `.weight` is how the
magnitudes are named in a model, and how tools that save a model's own state name them."""

INFIXES = ("modules_to_save.weight", "modules_to_save.default.weight")
"""Ends of a completely saved weight's name within the model. PEFT itself loads the weight only
under the module's plain name, and ignores these if that is in the file too."""


class ModuleState(Enum):
    """What PEFT has put around a module, by which the module's own parameters are named."""

    PLAIN = ""
    ADAPTED = "base_layer."
    SAVED = "original_module."
    TOKENS = "token_adapter.base_layer."


COPY_ENDINGS: Mapping[str, str] = {
    **{f"{state.value}weight": "save_embedding_layers" for state in ModuleState},
    **dict.fromkeys(INFIXES, "modules_to_save"),
}
"""Ends of the names of a module's own weight and of its infixes, with the option of PEFT that
writes them."""
