"""The final states of rows: those of Hugging Face and PEFT, and the same bits in every batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loraplex_model.adapters.delta import AdapterDelta, NormDelta, lora
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.config import MODEL
from loraplex_model.decoder.layout import PassOutOfBounds
from model.conftest import Load
from model.passes import BLOCK_SIZE, NUM_BLOCKS, token_ids

from model import peft_oracle, tiny

VARIANTS = ("llama", "qwen3")
NAMES = list(peft_oracle.ADAPTERS)
LENGTHS = (9, 14, 6, 11, 14, 3)
MIXES: list[Mix] = [(), *(((slot, 1.0),) for slot in range(len(NAMES))), ()]
BLOCKS = 4
"""KV blocks of a row."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peft(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tiny.write(variant, tmp_path_factory.mktemp("states") / variant)
    base = peft_oracle.quantised(directory, torch.float32)
    return peft_oracle.with_adapters(base, peft_oracle.ADAPTERS)


def open_decoder(decoder_class: Any, load_tiny: Load, variant: str, peft: Any) -> Any:
    weights = load_tiny(variant).weights
    decoder = decoder_class(weights, NUM_BLOCKS, BLOCK_SIZE, len(NAMES) + 1)
    for slot, name in enumerate(NAMES):
        decoder.table.publish(slot, pack(lora(peft_oracle.factors_of(peft, name)), torch.float32))
    return decoder


def prompt(row: int) -> list[int]:
    return token_ids(row, LENGTHS[row], tiny.VOCAB)


def part(row: int, first: int, end: int, mix: Mix | None = None) -> Any:
    """Tokens `first` to `end` of a row, as a sequence of a batch."""
    blocks = list(range(row * BLOCKS, (row + 1) * BLOCKS))
    return prompt(row)[first:end], first, blocks, MIXES[row] if mix is None else mix


def states_of(decoder: Any, parts: list[Any], rows: list[int], logits: list[int]) -> torch.Tensor:
    batch = ForwardBatch.build(parts, logits, state_rows=rows)
    states = torch.full((len(rows), decoder.weights.config.hidden_size), float("nan"))
    found = decoder.forward(batch, states=states)
    assert len(found) == len(logits)
    return states


def alone(decoder: Any, row: int, mix: Mix | None = None) -> torch.Tensor:
    return states_of(decoder, [part(row, 0, LENGTHS[row], mix)], list(range(LENGTHS[row])), [])


def test_states_are_pefts_last_hidden_states(
    variant: str, peft: Any, decoder_class: Any, load_tiny: Load
) -> None:
    decoder = open_decoder(decoder_class, load_tiny, variant, peft)
    parts = [part(row, 0, length) for row, length in enumerate(LENGTHS)]
    total = sum(LENGTHS)
    found = states_of(decoder, parts, list(range(total)), [total - 1]).split(list(LENGTHS))
    for row, states in enumerate(found):
        names = [NAMES[slot] for slot, _ in MIXES[row]] or ["__base__"]
        with torch.no_grad():
            wanted = peft(
                torch.tensor([prompt(row)]), adapter_names=names, output_hidden_states=True
            ).hidden_states[-1][0]
        torch.testing.assert_close(states, wanted, atol=3e-5, rtol=1e-5)


def test_neighbours_and_chunks_change_no_bit(
    variant: str, peft: Any, decoder_class: Any, load_tiny: Load
) -> None:
    decoder = open_decoder(decoder_class, load_tiny, variant, peft)
    exact = not decoder.kernels.startswith("torch")  # the oracle in torch has no fixed order
    for row, length in enumerate(LENGTHS):
        wanted = alone(decoder, row)
        others = [other for other in range(len(LENGTHS)) if other != row]
        cut = length // 2
        first = [part(other, 0, 2) for other in others[:2]]
        at = 4
        chunk = states_of(
            decoder,
            [*first, part(row, 0, cut), part(others[2], 0, 1)],
            list(range(at, at + cut)),
            [0, 1, at],
        )
        rest = states_of(
            decoder,
            [part(others[0], 2, 3), part(row, cut, length), part(others[1], 2, 3)],
            list(range(1, 1 + length - cut)),
            [0, 1 + length - cut],
        )
        found = torch.cat([chunk, rest])
        if exact:
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-5)


def test_states_change_no_logits(
    variant: str, peft: Any, decoder_class: Any, load_tiny: Load
) -> None:
    decoder = open_decoder(decoder_class, load_tiny, variant, peft)
    parts = [part(row, 0, length) for row, length in enumerate(LENGTHS)]
    logits = decoder.forward(ForwardBatch.build(parts, [3, 20]))
    states = torch.empty(3, decoder.weights.config.hidden_size)
    with_states = ForwardBatch.build(parts, [3, 20], state_rows=[3, 8, 40])
    assert torch.equal(decoder.forward(with_states, states=states), logits)


def test_an_adapters_own_last_norm_is_applied(
    variant: str, peft: Any, decoder_class: Any, load_tiny: Load
) -> None:
    """The norm is not among the modules of LoRA, and code of its own on CUDA."""
    decoder = open_decoder(decoder_class, load_tiny, variant, peft)
    weight = decoder.weights.norm
    change = 0.5 * torch.rand(len(weight), generator=torch.Generator().manual_seed(3))
    delta = AdapterDelta({(MODEL, "norm"): NormDelta(change)})
    decoder.table.publish(len(NAMES), pack(delta, torch.float32))
    own: Mix = ((len(NAMES), 1.0),)
    base = alone(decoder, 1, ())
    changed = alone(decoder, 1, own)
    factor = (weight + change) / weight
    torch.testing.assert_close(changed, base * factor, atol=3e-5, rtol=1e-5)
    parts = [part(0, 0, 4, ()), part(1, 0, LENGTHS[1], own), part(2, 0, 3, ())]
    mixed = states_of(decoder, parts, [1, 4, 4 + LENGTHS[1] - 1, 4 + LENGTHS[1]], [0, 5])
    assert torch.equal(mixed[1], changed[0])
    assert torch.equal(mixed[2], changed[-1])
    torch.testing.assert_close(mixed[0], alone(decoder, 0, ())[1], atol=3e-5, rtol=1e-5)


def test_rows_beyond_the_pass_are_refused(
    variant: str, peft: Any, decoder_class: Any, load_tiny: Load
) -> None:
    decoder = open_decoder(decoder_class, load_tiny, variant, peft)
    if decoder.kernels.startswith("torch"):
        pytest.skip("torch checks the rows itself")
    batch = ForwardBatch.build([part(0, 0, 4)], [3], state_rows=[4])
    for rows in ([4], [-1], [0, 1 << 30]):
        batch.state_rows.resize(len(rows), refcheck=False)
        batch.state_rows[:] = np.array(rows, np.int32)
        with pytest.raises(PassOutOfBounds):
            decoder.forward(batch, states=torch.empty(len(rows), decoder.weights.norm.shape[0]))
