"""No number of a batch becomes an address outside of the model's tables; R3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loraplex_model.adapters.delta import AdapterDelta, VirtualTokens
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder.layout import PassOutOfBounds
from loraplex_model.decoder.native import NativeDecoder

from model import tiny

pytestmark = pytest.mark.fault("virtual-tokens-beyond-context")

BLOCKS, BLOCK_SIZE, SLOTS, POSITIONS, VIRTUAL = 6, 4, 3, 18, 3
PROMPT = 1  # the slot of an adapter with virtual tokens
ALONE: Mix = ((PROMPT, 1.0),)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> NativeDecoder:
    folder = tmp_path_factory.mktemp("bounds")
    checkpoint = tiny.write("llama", folder / "model")
    base = load_base(str(checkpoint), torch.float32, folder / "cache")
    decoder = NativeDecoder(
        base.weights, BLOCKS, BLOCK_SIZE, SLOTS, max_positions=POSITIONS, threads=1
    )
    rows = torch.randn(VIRTUAL, base.weights.config.hidden_size)
    decoder.table.publish(
        PROMPT, pack(AdapterDelta(virtual=VirtualTokens(embeddings=rows)), torch.float32)
    )
    return decoder


def batch(
    ids: list[int], first: int = 0, blocks: list[int] | None = None, mix: Mix = ()
) -> ForwardBatch:
    """A good row and the given one."""
    own = [1, 2, 3, 4, 5] if blocks is None else blocks
    return ForwardBatch.build([([7, 8], 0, [0], ()), (ids, first, own, mix)])


def changed(**arrays: list[int]) -> ForwardBatch:
    """A good batch of two sequences of two tokens, with other arrays."""
    kinds = {"is_long": np.bool_}
    given = {k: np.asarray(v, kinds.get(k, np.int32)) for k, v in arrays.items()}
    return replace(batch([3, 4]), **given)


GOOD = {
    "last position": batch([3], POSITIONS - 1),
    "last block": batch([3], 0, [BLOCKS - 1]),
    "last token": batch([tiny.VOCAB - 1]),
    "last virtual token": batch([tiny.VOCAB + VIRTUAL - 1], mix=ALONE),
    "last slot": batch([3], mix=((SLOTS - 1, 1.0),)),
    "no logits": changed(logit_rows=[]),
    "long sequences": changed(is_long=[1, 1]),
}

HOSTILE = {
    "position behind the tables": (batch([3], POSITIONS, [0, 1, 2, 3, 4]), "position"),
    "last of many positions": (batch([3] * 4, POSITIONS - 3, [0, 1, 2, 3, 4, 5]), "position"),
    "negative position": (batch([3], -1), "position"),
    "huge position": (batch([3], 2**31 - 2), "position"),
    "position behind the block table": (batch([3], 8, [1, 2]), "position"),
    "block behind the cache": (batch([3], 0, [BLOCKS]), "block"),
    "block behind the cache, of the past": (batch([3], 9, [1, BLOCKS, 2]), "block"),
    "negative block": (batch([3], 0, [-1]), "block"),
    "slot behind the table": (batch([3], mix=((SLOTS, 1.0),)), "slot"),
    "second slot behind the table": (batch([3], mix=((0, 0.5), (SLOTS, 0.5))), "slot"),
    "negative slot": (batch([3], mix=((-1, 1.0),)), "slot"),
    "token behind the vocabulary": (batch([tiny.VOCAB]), "token"),
    "virtual token of an adapter without": (batch([tiny.VOCAB], mix=((0, 1.0),)), "token"),
    "virtual token too many": (batch([tiny.VOCAB + VIRTUAL], mix=ALONE), "token"),
    "huge token": (batch([2**31 - 1], mix=ALONE), "token"),
    "negative token": (batch([-1]), "token"),
    "logits behind the rows": (changed(logit_rows=[1, 4]), "row"),
    "logits before the rows": (changed(logit_rows=[-1]), "row"),
    "rows that do not start": (changed(query_starts=[1, 2, 4]), "row"),
    "rows that go backwards": (changed(query_starts=[0, 5, 4]), "row"),
    "rows behind the tokens": (changed(query_starts=[0, 2, 5]), "row"),
    "long sequences too few": (changed(is_long=[1]), "row"),
    "long sequences too many": (changed(is_long=[0, 0, 1]), "row"),
    "mixes behind the slots": (changed(mix_starts=[0, 0, 1]), "slot"),
    "mixes that go backwards": (changed(mix_starts=[0, -1, 0]), "slot"),
    "nothing": (changed(tokens=[], positions=[], query_starts=[0, 0, 0], logit_rows=[]), "row"),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_last_of_everything_is_computed(name: str, decoder: NativeDecoder) -> None:
    assert torch.isfinite(decoder.forward(GOOD[name])).all()


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_is_outside_is_refused_and_the_next_pass_has_the_same_bits(
    name: str, decoder: NativeDecoder
) -> None:
    hostile, what = HOSTILE[name]
    before = decoder.forward(batch([3, 4]))
    cache = [layer.clone() for layer in (*decoder.keys, *decoder.values)]
    with pytest.raises(PassOutOfBounds, match=what):
        decoder.forward(hostile)
    assert all(map(torch.equal, cache, (*decoder.keys, *decoder.values)))
    assert torch.equal(decoder.forward(batch([3, 4])), before)


def test_virtual_tokens_leave_with_their_adapter(decoder: NativeDecoder, tmp_path: Path) -> None:
    adapter = decoder.table.adapters[PROMPT]
    assert adapter is not None
    decoder.table.remove(PROMPT)
    with pytest.raises(PassOutOfBounds, match="token"):
        decoder.forward(batch([tiny.VOCAB], mix=ALONE))
    decoder.table.publish(PROMPT, adapter)
    decoder.forward(batch([tiny.VOCAB], mix=ALONE))
