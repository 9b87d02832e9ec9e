"""The numbers of a pass on their way to a device, and the checks before; no device is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernels.test_bounds import BLOCK_SIZE, BLOCKS, GOOD, HOSTILE, POSITIONS, PROMPT, SLOTS, VIRTUAL
from kernels.test_bounds import batch as one_more
from loraplex_model.decoder.cuda.step.bounds import Bounds
from loraplex_model.decoder.cuda.step.staging import Layout, Segment, Staging, Transfers
from loraplex_model.decoder.layout import PassOutOfBounds

from model import tiny

CPU = torch.device("cpu")
LAYOUT = Layout({
    "rows": Segment("i4", 5, fill=-1),
    "weights": Segment("f4", 3),
    "wide": Segment("i8", 2, fill=7),
    "ragged": Segment("i4", 100),
})  # fmt: skip


def arrays(ragged: int = 0) -> dict[str, Any]:
    return {
        "rows": np.array([[4, 5]], np.int32),
        "weights": np.array([0.5, -2.0, 1.0], np.float32),
        "wide": np.empty(0, np.int64),
        "ragged": np.arange(ragged, dtype=np.int32),
        "unknown": np.zeros(1),
    }


def test_arrays_arrive_with_fill_values_behind_them() -> None:
    transfers = Transfers()
    staging = Staging(CPU, LAYOUT.nbytes, transfers)
    staging.buffer.fill_(9)
    staging.send(LAYOUT, arrays(ragged=3))
    views = LAYOUT.views(staging.buffer)
    assert views["rows"].tolist() == [4, 5, -1, -1, -1]
    assert views["weights"].tolist() == [0.5, -2.0, 1.0]
    assert views["wide"].tolist() == [7, 7]
    assert views["ragged"][:3].tolist() == [0, 1, 2]
    assert (views["ragged"][3:].view(torch.uint8) == 9).all(), "more than what is used was copied"
    assert all(view.data_ptr() % 64 == 0 for view in views.values())
    assert (transfers.copies_in, transfers.copies_out, transfers.synchronisations) == (1, 0, 0)


def test_an_array_that_is_too_large_or_missing_is_an_error() -> None:
    staging = Staging(CPU, LAYOUT.nbytes, Transfers())
    with pytest.raises(ValueError, match="ragged has 101"):
        staging.send(LAYOUT, arrays(ragged=101))
    with pytest.raises(KeyError, match="rows"):
        staging.send(LAYOUT, {"weights": np.zeros(3, np.float32)})


class Copy:
    """An event of a copy, which is done once somebody has waited for it."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done


class Slow(Transfers):
    """A device that copies when it is waited for, and not before."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[Copy, torch.Tensor, torch.Tensor]] = []

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.waiting.append((Copy(), target, source))

    def mark(self, device: torch.device) -> Any:
        return self.waiting[-1][0]

    def wait(self, event: Any) -> None:
        self.synchronisations += 1
        while self.waiting and not event.is_done:
            copy, target, source = self.waiting.pop(0)
            target.copy_(source)
            copy.is_done = True


def test_a_buffer_is_not_written_again_before_its_copy_is_done() -> None:
    """Three passes in a row: the first one's numbers reach the device unchanged."""
    transfers = Slow()
    staging = Staging(CPU, LAYOUT.nbytes, transfers)
    seen = []
    for first in range(3):
        sent = arrays(ragged=2)
        sent["rows"] = np.array([first], np.int32)
        staging.send(LAYOUT, sent)
        seen.append(transfers.synchronisations)
    assert seen == [0, 0, 1]
    assert LAYOUT.views(staging.buffer)["rows"][0] == 0
    transfers.wait(transfers.waiting[-1][0])
    assert LAYOUT.views(staging.buffer)["rows"][0] == 2


BOUNDS = Bounds(tiny.VOCAB, POSITIONS, BLOCK_SIZE, BLOCKS, SLOTS)
PROMPTS = np.zeros(SLOTS, np.int32)
PROMPTS[PROMPT] = VIRTUAL


@pytest.mark.parametrize("name", GOOD)
def test_what_the_native_decoder_computes_is_within_bounds(name: str) -> None:
    BOUNDS.check(GOOD[name], PROMPTS, drawn=0)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_native_decoder_refuses_is_refused_for_the_same_reason(name: str) -> None:
    hostile, what = HOSTILE[name]
    with pytest.raises(PassOutOfBounds, match=what):
        BOUNDS.check(hostile, PROMPTS, drawn=0)


def test_tokens_that_were_drawn_before_are_known() -> None:
    """The last token, -2, is the second of them."""
    BOUNDS.check(one_more([-2]), PROMPTS, drawn=2)
    with pytest.raises(PassOutOfBounds, match="token"):
        BOUNDS.check(one_more([-2]), PROMPTS, drawn=1)


def test_copies_of_blocks_and_lengths_of_contexts_are_checked_too() -> None:
    good = one_more([3, 4])
    for copies in ([[0, BLOCKS]], [[-1, 0]]):
        with pytest.raises(PassOutOfBounds, match="block"):
            BOUNDS.check(replace(good, copies=np.array(copies, np.int32)), PROMPTS, drawn=0)
    with pytest.raises(PassOutOfBounds, match="position"):
        BOUNDS.check(replace(good, context_lens=good.context_lens + 1), PROMPTS, drawn=0)
