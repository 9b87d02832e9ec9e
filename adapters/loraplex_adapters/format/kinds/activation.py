"""Activated LoRA (aLoRA, arXiv 2504.12397): A and B act on the last tokens of a sequence only.

As in PEFT, they act from the first token of the last occurrence of the invocation tokens in the
prompt on, and on everything that is generated. All tokens before are computed by the base alone, so
their keys and values are the base's. Without an occurrence in the prompt nothing is changed.

What would change tokens before the invocation, or what PEFT cannot combine with it, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.modules import EMBEDDING
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.support import is_neutral

INVOCATION_OPTION = "alora_invocation_tokens"

MAX_INVOCATION_TOKENS = 128
"""Most invocation tokens, since every position of a prompt may be compared with all of them."""

BEFORE = "it would change the tokens before the invocation, which only the base may compute"
"""Why a change that is not limited to the tokens after the invocation is refused."""

_COMBINATION = "PEFT cannot combine the two"

_EXCLUDED: Mapping[str, str] = {
    "bias": BEFORE,
    "kasa_config": _COMBINATION,
    "modules_to_save": BEFORE,
    "monteclora_config": _COMBINATION,
    "target_parameters": BEFORE,
    "trainable_token_indices": BEFORE,
    "use_bdlora": _COMBINATION,
    "use_dora": _COMBINATION,
    "use_qalora": _COMBINATION,
    "velora_config": _COMBINATION,
}


def read_invocation(reader: Reader) -> tuple[int, ...]:
    """The invocation tokens; () for an adapter that acts on all tokens."""
    value = reader.config.get(INVOCATION_OPTION)
    if value is None:
        return ()
    tokens = reader.token_ids(INVOCATION_OPTION, value, distinct=False)
    if tokens is not None and len(tokens) > MAX_INVOCATION_TOKENS:
        problem = f"has {len(tokens)} token ids; at most {MAX_INVOCATION_TOKENS} are supported"
        reader.unsupported(INVOCATION_OPTION, problem)
    for key, why in _EXCLUDED.items():
        if not is_neutral(key, reader.config.get(key)):
            reader.unsupported(key, f"is set together with {INVOCATION_OPTION}: {why}")
    if reader.config.get("init_lora_weights") == "mica":
        problem = f"is mica together with {INVOCATION_OPTION}: {_COMBINATION}"
        reader.unsupported("init_lora_weights", problem)
    return tokens or ()


def place_invocation(file: Placement, tokens: tuple[int, ...], adapted: Collection[Site]) -> None:
    """Notes an adapter's invocation tokens; `adapted` are the sites that have A and B."""
    file.invocation_tokens = tokens
    vocabulary = file.base.config.vocab_size
    if tokens and max(tokens) >= vocabulary:
        message = f"{INVOCATION_OPTION} has the token id {max(tokens)}; this base has {vocabulary}"
        file.find(Reason.BASE_MODEL_MISMATCH, message, INVOCATION_OPTION)
    if tokens and EMBEDDING in adapted:
        path = file.path(EMBEDDING)
        message = f"{path} is adapted together with {INVOCATION_OPTION}: {_COMBINATION}"
        file.find(Reason.ADAPTER_UNSUPPORTED, message, path)
