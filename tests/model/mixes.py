"""One sequence for every kind of change, and passes that compute them alone or all at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from loraplex_model.adapters.pack import pack
from model.changes import KINDS, random_adapter
from model.passes import Driver, Sequence, token_ids

MIXES: dict[str, Any] = {kind: ((slot, 1.0),) for slot, kind in enumerate(KINDS)} | {
    "base": (),
    "half": ((KINDS.index("everything"), 0.5),),
    "blend": tuple((slot, 0.3 + 0.1 * slot) for slot in range(len(KINDS))),
}


def with_adapters(decoder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The decoder with an adapter of each kind in the slot of its number."""
    for slot, kind in enumerate(KINDS):
        adapter = random_adapter(kind, decoder.weights.config, seed=slot)
        decoder.table.publish(slot, pack(adapter, dtype))
    return decoder


def ids_of(decoder: Any, index: int) -> list[int]:
    """The sequence of a mix by its number."""
    return [3, 17, *token_ids(index, 9, decoder.weights.config.vocab_size)]


def solo(decoder: Any, mix: Any, ids: list[int]) -> torch.Tensor:
    """The logits of one sequence in passes of its own."""
    sequence = Sequence(ids, mix)
    driver = Driver(decoder)
    driver.step((sequence, len(ids) - 1))
    driver.step((sequence, 1))
    return torch.cat(sequence.logits)


def together(decoder: Any, names: Iterable[str] = MIXES) -> dict[str, torch.Tensor]:
    """The logits of one sequence per mix, all in the same passes, in an order of their own."""
    numbers = {name: number for number, name in enumerate(MIXES)}
    sequences = {name: Sequence(ids_of(decoder, numbers[name]), MIXES[name]) for name in names}
    driver = Driver(decoder, seed=5)
    parts = sorted(sequences.values(), key=lambda s: s.ids[-1])
    driver.step(*((sequence, 4) for sequence in parts))
    driver.step(*((sequence, len(sequence.ids) - 5) for sequence in reversed(parts)))
    driver.step(*((sequence, 1) for sequence in parts))
    return {name: torch.cat(sequence.logits) for name, sequence in sequences.items()}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())
