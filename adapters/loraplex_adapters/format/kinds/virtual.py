"""Virtual tokens as embeddings (PROMPT_TUNING, P_TUNING, CPT) or as keys and values (the others).

PEFT saves the output of the encoders of P_TUNING and PREFIX_TUNING, not the encoders, and the whole
of what CPT and CARTRIDGE divide into a frozen and a trained part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.modules import VIRTUAL_TOKENS
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import Option, ignored, refused, served

ROOM = 2
"""Positions that virtual tokens leave free: one token of the prompt and one of the answer."""

TENSOR = "prompt_embeddings"
"""The tensor with the virtual tokens, one a row."""


@dataclass(frozen=True, slots=True)
class VirtualReading:
    """The options of virtual tokens.

    Attributes:
        role: "prompt" or "prefix".
        count: number of virtual tokens.
        base: properties of the base in the configuration, by key; None if it does not have them.
    """

    role: str
    count: int
    base: Mapping[str, int | None]

    def place(self, file: Placement) -> list[ModuleSpec]:
        """The only tensor of the file."""
        base = file.base.config
        self._check_count(file)
        actual = {"token_dim": base.hidden_size}
        if self.role == "prefix":
            actual = {"token_dim": base.kv_size, "num_attention_heads": base.num_kv_heads}
            actual["num_layers"] = base.num_layers
        for key, size in actual.items():
            given = self.base.get(key)
            if given is not None and given != size:
                message = f"{key} is {given}; this base has {size}"
                file.find(Reason.BASE_MODEL_MISMATCH, message, key)
        tensor = file.require(VIRTUAL_TOKENS, TENSOR)
        held = file.fits(VIRTUAL_TOKENS, {self.role: tensor})
        if held is None or tensor is None:
            return []
        if held != self.count:
            message = f"{TENSOR} has {held} rows; num_virtual_tokens is {self.count}"
            file.find(Reason.ADAPTER_INVALID, message, "num_virtual_tokens")
        return [ModuleSpec(*VIRTUAL_TOKENS, {self.role: tensor})]

    def _check_count(self, file: Placement) -> None:
        """Reports more virtual tokens than the limits allow or than leave room in the context."""
        positions = file.base.config.max_positions
        context = min(positions, file.limits.max_context or positions)
        message = f"num_virtual_tokens is {self.count}; "
        if self.count > file.limits.max_virtual_tokens:
            message += f"at most {file.limits.max_virtual_tokens} are allowed (max_virtual_tokens)"
        elif self.count + ROOM > context:
            message += f"the context of {context} positions (max_context) has room for "
            message += f"{max(context - ROOM, 0)} with one token each of prompt and answer"
        else:
            return
        file.find(Reason.ADAPTER_TOO_LARGE, message, "num_virtual_tokens")


def read_virtual(reader: Reader, role: str) -> VirtualReading | None:
    """Reads the options that all kinds of virtual tokens have in common."""
    count = reader.integer("num_virtual_tokens")
    keys = ("token_dim", "num_attention_heads", "num_layers")
    base = {key: reader.optional_integer(key) for key in keys}
    submodules = reader.optional_integer("num_transformer_submodules")
    if submodules not in (None, 1):
        reader.unsupported("num_transformer_submodules", "is not 1")
    return VirtualReading(role, count, base) if count else None


VIRTUAL_OPTIONS: Mapping[str, Option] = {
    "modules_to_save": refused("fully trained modules together with virtual tokens"),
    "num_attention_heads": served(),
    "num_layers": served(),
    "num_transformer_submodules": served("1"),
    "num_virtual_tokens": served(),
    "token_dim": served(),
}
"""Options that all kinds of virtual tokens have in common."""

PROMPT_OPTIONS: Mapping[str, Option] = {
    **VIRTUAL_OPTIONS,
    "prompt_tuning_init": ignored(),
    "prompt_tuning_init_text": ignored(),
    "tokenizer_kwargs": ignored(),
    "tokenizer_name_or_path": ignored(),
}
"""Options of PROMPT_TUNING and of the kinds that PEFT derives from it."""

_TRAINING = ignored("acts in training only")
_FOLDED = ignored("PEFT folds the encoder into the embeddings that it saves")

PROMPT_TUNING = Kind(
    peft_type="PROMPT_TUNING",
    summary="virtual tokens before the prompt",
    options=PROMPT_OPTIONS,
    endings={TENSOR: ""},
    read=partial(read_virtual, role="prompt"),
    whole_names=True,
)

P_TUNING = Kind(
    peft_type="P_TUNING",
    summary="P-tuning: virtual tokens from an encoder",
    options={
        **VIRTUAL_OPTIONS,
        "encoder_dropout": _FOLDED,
        "encoder_hidden_size": _FOLDED,
        "encoder_num_layers": _FOLDED,
        "encoder_reparameterization_type": _FOLDED,
    },
    endings={TENSOR: ""},
    read=partial(read_virtual, role="prompt"),
    whole_names=True,
)

PREFIX_TUNING = Kind(
    peft_type="PREFIX_TUNING",
    summary="prefix tuning, P-tuning v2: keys and values before the prompt",
    options={
        **VIRTUAL_OPTIONS,
        "encoder_hidden_size": _FOLDED,
        "init_weights": ignored(),
        "prefix_projection": _FOLDED,
    },
    endings={TENSOR: ""},
    read=partial(read_virtual, role="prefix"),
    whole_names=True,
)

CPT = Kind(
    peft_type="CPT",
    summary="context-aware prompt tuning: virtual tokens from examples",
    options={
        **VIRTUAL_OPTIONS,
        "cpt_mask": _TRAINING,
        "cpt_token_ids": ignored("the embeddings are in the file"),
        "cpt_tokens_type_mask": _TRAINING,
        "opt_loss_decay_factor": _TRAINING,
        "opt_projection_epsilon": _TRAINING,
        "opt_projection_format_epsilon": _TRAINING,
        "opt_weighted_loss_type": _TRAINING,
        "tokenizer_name_or_path": ignored(),
    },
    endings={TENSOR: ""},
    read=partial(read_virtual, role="prompt"),
    whole_names=True,
)

CARTRIDGE = Kind(
    peft_type="CARTRIDGE",
    summary="cartridges: a trained cache of keys and values before the prompt",
    options={
        **VIRTUAL_OPTIONS,
        "num_frozen_tokens": ignored("the frozen rows are in the file as well"),
    },
    endings={TENSOR: ""},
    read=partial(read_virtual, role="prefix"),
    whole_names=True,
)
