"""Adapters whose files hold weights of the base itself, changed, as PEFT writes or loads them.

Every case fits any base. On one that ties embeddings and head, PEFT loads a copy of either into
both, and of two copies the head's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from adapters.peft_files import Case, Q, lora

Tensors = dict[str, torch.Tensor]

PREFIX = "base_model.model."
EMBED, HEAD, NORM = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head", f"{PREFIX}model.norm"
ROWS = [5, 9]
"""Tokens whose rows differ from the base's in a copy; every prompt of the tests has them."""


def change_rows(model: Any) -> None:
    """Changes two rows of embeddings and head, as if the author's base had others."""
    base = model.get_base_model()
    random = torch.Generator().manual_seed(7)
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        weight = getattr(layer, "base_layer", layer).weight
        with torch.no_grad():
            weight[ROWS] += 0.5 * torch.randn(2, weight.shape[1], generator=random)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random values like those of a weight."""
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def add(*names: str, like: str = "q_proj.lora_A.weight") -> Callable[[Tensors], None]:
    """Adds tensors of the shape of the embeddings under these names, each with its own values.

    `like` is the end of the name of a tensor with the base's width.
    """

    def edit(tensors: Tensors) -> None:
        width = next(t.shape[-1] for name, t in tensors.items() if name.endswith(like))
        for seed, name in enumerate(names):
            tensors[name] = noise(128, width, seed=seed)

    return edit


def add_norm(tensors: Tensors) -> None:
    """Adds the last norm's weight under its plain name."""
    width = tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"].shape[1]
    tensors[f"{NORM}.weight"] = 1 + noise(width)


def save_twice(tensors: Tensors) -> None:
    """Adds the saved embeddings under their name in the model."""
    tensors[f"{EMBED}.modules_to_save.weight"] = tensors[f"{EMBED}.weight"].clone()


def spell(old: str, new: str) -> Callable[[Tensors], None]:
    """Renames the tensors whose names end in `old`."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(old)]:
            tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return edit


TOKENS = {"trainable_token_indices": [9, 3]}

CASES: dict[str, Case] = {
    "copy of the head": replace(
        lora("llama", {}, target_modules=[Q, "lm_head"]), prepare=change_rows
    ),
    "copy of the embeddings": replace(
        lora("llama", {}, target_modules=[Q, "embed_tokens"]), prepare=change_rows
    ),
    "copies of both": replace(
        lora("llama", {}, target_modules=["embed_tokens", "lm_head"]), prepare=change_rows
    ),
    "plain embeddings": replace(lora("llama", {}), edit=add(f"{EMBED}.weight")),
    "plain weights": replace(lora("llama", {}), edit=add(f"{EMBED}.weight", f"{HEAD}.weight")),
    "plain head, saved embeddings": replace(
        lora("llama", {}, modules_to_save=["embed_tokens"]), edit=add(f"{HEAD}.weight")
    ),
    "plain norm": replace(lora("llama", {}), edit=add_norm),
    "saved under two names": replace(
        lora("llama", {}, modules_to_save=["embed_tokens"]), edit=save_twice
    ),
    "copy under a saved head": replace(
        lora("llama", {}, modules_to_save=["lm_head"]), edit=add(f"{HEAD}.original_module.weight")
    ),
    "copy under tokens": replace(
        lora("llama", {}, **TOKENS), edit=add(f"{EMBED}.token_adapter.base_layer.weight")
    ),
    "copy under tokens alone": Case(
        "llama",
        "TrainableTokensConfig",
        {"token_indices": [5, 3]},
        {},
        edit=add(f"{EMBED}.base_layer.weight", like="trainable_tokens_delta"),
    ),
    "magnitudes by their name in the model": replace(
        lora("llama", {}, use_dora=True),
        edit=spell("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    ),
    "magnitudes by their full name in the model": replace(
        lora("llama", {}, use_dora=True),
        edit=spell("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
    ),
}
