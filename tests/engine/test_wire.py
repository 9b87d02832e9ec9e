"""Frames survive any cutting of the byte stream, and nothing else passes for one."""

from __future__ import annotations

import itertools

import pytest
from adapters.adapter_files import BASE
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Reason
from loraplex_server.engine.messages import (
    Abort,
    AdapterRef,
    AdapterStatus,
    ControlDone,
    Failure,
    Hello,
    Load,
    LoadDone,
    Logprobs,
    Merge,
    MergeDone,
    ModelInfo,
    Output,
    SamplingParams,
    SetPinned,
    Shutdown,
    StepReport,
    StepStats,
    Submit,
    Unload,
    Unmerge,
)
from loraplex_server.engine.process import wire

REF = AdapterRef("sha256:00", "/store/00", 0.5)
TO_ENGINE = [
    Submit(
        7,
        [1, 2],
        3,
        [REF],
        SamplingParams(temperature=0.5, logit_bias={3: -1.0}, seed=2**64 - 1),
        [2],
        logprobs=0,
        deadline=1.5,
    ),
    Abort(7),
    Load(1, REF),
    Unload(2, "sha256:00", True, deadline=5.0),
    SetPinned(3, REF, True),
    Merge(4, REF),
    Unmerge(5, "sha256:00"),
    Shutdown(),
]
STATS = StepStats(1, 0.1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
INFO = ModelInfo(BASE, "tiny", "cpu", "C++ avx2", "/cache/tiny", 64, [2])
FROM_ENGINE = [
    Hello(INFO, 8, 16, 1 << 20),
    StepReport(
        [
            Output(7, [1], [Logprobs(1, -0.5, [(1, -0.5)])], started=True),
            Output(8, error=Failure(Reason.OVERLOADED, "full")),
        ],
        STATS,
        [AdapterStatus("sha256:00", "resident", 5, 1, "/store/00", merged_bytes=7, pinned=True)],
    ),
    LoadDone("sha256:00", 0.5, tier="host"),
    MergeDone("sha256:00", True, 0.5),
    ControlDone(2, Failure(Reason.ADAPTER_INVALID, "bad")),
]


@pytest.mark.parametrize("message", TO_ENGINE)
def test_a_message_to_the_engine_arrives_as_it_was(message: object) -> None:
    assert wire.decode(wire.encode(message)[4:], wire.TO_ENGINE) == message


@pytest.mark.parametrize("message", FROM_ENGINE)
def test_a_message_from_the_engine_arrives_as_it_was(message: object) -> None:
    assert wire.decode(wire.encode(message)[4:], wire.FROM_ENGINE) == message


STREAM = b"".join(wire.encode(message) for message in TO_ENGINE)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_frames_survive_any_cutting(cuts: list[int]) -> None:
    frames, got = wire.Frames(), []
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(STREAM)]):
        got += [wire.decode(p, wire.TO_ENGINE) for p in frames.feed(STREAM[begin:end])]
    assert got == TO_ENGINE


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_other_bytes_are_no_message(payload: bytes) -> None:
    for decoder in (wire.TO_ENGINE, wire.FROM_ENGINE):
        try:
            message = wire.decode(payload, decoder)
        except wire.WireError:
            continue
        assert wire.decode(wire.encode(message)[4:], decoder) == message


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(wire.WireError, match="longer"):
        list(wire.Frames().feed((wire.MAX_FRAME + 1).to_bytes(4, "little")))
