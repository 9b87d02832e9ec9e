"""The part of a local runner that launches passes, over a decoder that only notes what it is given.

`tests/cuda/test_launch_decoder.py` has the same with the decoder for CUDA.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.decoder.cuda.draws import RECORD, DrawTable, Field
from loraplex_server.engine.runner.device_errors import DeviceErrors
from loraplex_server.engine.runner.launching import Launcher
from loraplex_server.engine.runner.protocol import DeviceLost, DrawOrder, OutOfDeviceMemory

BATCH = ForwardBatch.build([([1, 2], 0, [0], ()), ([3], 0, [1], ())])
NOBODY = np.empty(0, np.int32)


def order_of(**changes: object) -> DrawOrder:
    fields = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "uniform": 1 / 3,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seen": NOBODY,
        "counted": NOBODY,
        "counts": np.empty(0, np.float32),
    }
    return DrawOrder(**{**fields, **changes})


class NotingDecoder:
    """A decoder whose tokens are the rows of the draws; fails as told."""

    def __init__(self, fails_at_launch: Exception | None = None, fails_later: bool = False) -> None:
        self.fails_at_launch = fails_at_launch
        self.fails_later = fails_later
        self.is_mapped = False
        self.inference = False

    @contextmanager
    def mapped(self):
        self.is_mapped = True
        yield
        self.is_mapped = False

    def launch(self, batch: ForwardBatch, draws: DrawTable, lines: np.ndarray) -> NotingDecoder:
        assert self.is_mapped
        assert torch.is_inference_mode_enabled()
        if self.fails_at_launch:
            raise self.fails_at_launch
        self.tokens = draws.records[:, Field.ROW].copy()
        self.lines = lines
        return self

    def wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert not self.is_mapped
        if self.fails_later:
            raise RuntimeError("an illegal memory access was encountered")
        return self.tokens, np.zeros((len(self.lines), 4), np.float32), np.zeros((0, 2), np.float32)


def launcher(decoder: NotingDecoder, probe=lambda _: None) -> Launcher:
    errors = DeviceErrors(torch.device("cuda"), probe, lambda: None)
    return Launcher(decoder, errors, decoder.mapped)


def test_a_launch_hands_over_rows_and_lines() -> None:
    launch = launcher(NotingDecoder())
    ticket = launch(
        BATCH, [order_of(), order_of()], np.array([1, 0], np.int32), np.array([1], np.int32)
    )
    result = ticket.wait()
    assert result.tokens.tolist() == [1, 0]
    assert result.lines.shape == (1, 4)
    assert result.states.shape == (0, 2)


def test_errors_of_a_launch_and_of_its_ticket_are_those_of_the_seam() -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("the device does not answer")

    full = NotingDecoder(fails_at_launch=torch.OutOfMemoryError("no room"))
    with pytest.raises(OutOfDeviceMemory):
        launcher(full)(BATCH, [], NOBODY, NOBODY)
    ticket = launcher(NotingDecoder(fails_later=True), lost)(BATCH, [], NOBODY, NOBODY)
    with pytest.raises(DeviceLost):
        ticket.wait()
    ticket = launcher(NotingDecoder(fails_later=True))(BATCH, [], NOBODY, NOBODY)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ticket.wait()


def test_records_hold_all_parameters_with_their_bits() -> None:
    draws = [
        order_of(),
        order_of(temperature=0.0, top_k=2**40, uniform=1 - 2.0**-53),
        order_of(
            temperature=1e-300,
            repetition_penalty=1.5,
            frequency_penalty=0.25,
            seen=np.array([4, 5, 6], np.int32),
            counted=np.array([6, 5], np.int32),
            counts=np.array([3, 1], np.float32),
            pending=7,
        ),
        order_of(presence_penalty=-1.0, counted=np.array([9], np.int32), counts=np.ones(1, "f4")),
    ]
    table = DrawTable.of(draws, np.array([3, 1, 0, 2], np.int32))
    records = table.records
    assert records.shape == (4, RECORD)
    floats = records.view(np.float32)
    wide = [
        records[:, at : at + 2].copy().view(np.float64)[:, 0] for at in (Field.TOP_P, Field.UNIFORM)
    ]
    assert records[:, Field.ROW].tolist() == [3, 1, 0, 2]
    assert records[:, Field.TOP_K].tolist() == [40, 2**31 - 1, 40, 40]
    assert wide[0].tolist() == [0.9] * 4
    assert wide[1].tolist() == [1 / 3, 1 - 2.0**-53, 1 / 3, 1 / 3]
    np.testing.assert_array_equal(
        floats[:, Field.TEMPERATURE], np.array([0.7, 0, 1e-37, 0.7], "f4")
    )
    np.testing.assert_array_equal(floats[:, Field.MIN_P], np.full(4, 0.05, "f4"))
    assert floats[:, Field.REPETITION].tolist() == [1, 1, 1.5, 1]
    assert floats[:, Field.PRESENCE].tolist() == [0, 0, 0, -1]
    assert floats[:, Field.FREQUENCY].tolist() == [0, 0, 0.25, 0]
    assert records[:, Field.PENDING].tolist() == [-1, -1, 7, -1]
    assert records[:, Field.IS_PENALISED].tolist() == [0, 0, 1, 1]
    bounds = records[:, Field.SEEN_BEGIN : Field.COUNTED_END + 1].tolist()
    assert bounds == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 3, 3, 5], [7, 7, 7, 8]]
    assert table.lists[:5].tolist() == [4, 5, 6, 6, 5]
    assert table.lists[5:7].view(np.float32).tolist() == [3, 1]
    assert len(DrawTable.of([], NOBODY).records) == len(DrawTable.of([], NOBODY).lists) == 0
