"""Progress of a conversion: in the log from time to time, on a terminal as one line."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from loraplex_model.base.progress import ByteProgress
from loraplex_model.checkpoints.checkpoint import SafetensorsSource
from loraplex_model.checkpoints.conversion.survey import survey
from loraplex_model.checkpoints.convert import convert

from model import tiny


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_log_has_tensors_bytes_and_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex_model")
    clock = Clock()
    with ByteProgress("converting m", 40, 4_000_000_000, stream=io.StringIO(), now=clock) as done:
        for _ in range(40):
            clock.seconds += 3
            done.advance(100_000_000)
    first, *between, last = caplog.messages
    assert first == "converting m: 40 tensors, 4.00 GB"
    assert between[0] == "converting m: 4 of 40 tensors, 0.40 of 4.00 GB, 1 min 48 s left"
    assert len(between) == 10  # one line for every 10 s, at the next tensor
    assert last == "converting m: done in 120 s"


def test_a_terminal_has_one_line_that_is_removed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex_model")
    clock, screen = Clock(), Terminal()
    with ByteProgress("converting m", 3, 300, stream=screen, now=clock) as done:
        for _ in range(3):
            clock.seconds += 1
            done.advance(100)
    drawn = screen.getvalue()
    assert "\n" not in drawn
    assert drawn.startswith("\rconverting m: 1 of 3 tensors, 0.00 of 0.00 GB, 2 s left\x1b[K")
    assert drawn.endswith("\r\x1b[K")
    assert len(caplog.messages) == 2


def test_a_failure_is_not_reported_as_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex_model")
    with pytest.raises(OSError, match="full"), ByteProgress("x", 1, 1, stream=io.StringIO()):
        raise OSError("full")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("variant", ["llama", "qwen2-window"])
def test_a_conversion_counts_what_the_survey_promised(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(ByteProgress, "advance", lambda _, nbytes: seen.append(nbytes))
    source = SafetensorsSource(tiny.write(variant, tmp_path / "model"))
    convert(source, tmp_path / "out.safetensors")
    found = survey(source)
    assert (len(seen), sum(seen)) == (found.tensors, found.nbytes)
    names = len(source.names())
    assert found.tensors == names
