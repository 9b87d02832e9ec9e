"""Why a trainer that ended has made no adapter, in words that a client may read."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

from loraplex_training.report.events import JobState

from loraplex_server.training.jobs import Error
from loraplex_server.training.progress import Course

LOG_LINES: Final = 12
_MAX_LINE: Final = 500
_TAIL_BYTES: Final = 1 << 14

_PATH: Final = re.compile(
    r"(?<![\w.>])~?(?:/[^\s/:;,'\"`()\[\]{}<>|]+)+/([^\s/:;,'\"`()\[\]{}<>|]+)"
)
"""An absolute path of at least two parts; its last one says enough."""

_COMPLAINT: Final = re.compile(r"error: (?P<reason>[A-Z_]+): (?P<problem>.+)")


def of(status: int, course: Course, log: Path) -> Error:
    """The error of a trainer that ended with `status` (minus a signal's number) and no adapter."""
    said = tail(log)
    if course.ended is not None and course.ended.state is JobState.DIVERGED:
        return Error("DIVERGED", without_paths(course.ended.reason) or "the loss diverged", said)
    if status == -signal.SIGKILL:
        at = f" at step {course.progress.step}" if course.progress else ""
        text = f"the trainer was killed{at}: most likely the machine's memory ran out"
        return Error("OUT_OF_MEMORY", text, said)
    if status < 0:
        with suppress(ValueError):
            name = signal.Signals(-status).name
            return Error("TRAINER_CRASHED", f"the trainer died of {name}", said)
    if status == 0:
        return Error("TRAINER_CRASHED", "the trainer ended without an adapter", said)
    reason, problems = complaints(log)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Error(reason, problems[0] + more, said)
    return Error("TRAINER_CRASHED", f"the trainer ended with status {status}", said)


def complaints(log: Path) -> tuple[str, tuple[str, ...]]:
    """What the trainer found wrong, and the reason of it: its lines `error: REASON: ...`."""
    found = [match for line in _lines(log) if (match := _COMPLAINT.fullmatch(line))]
    problems = tuple(match["problem"][:_MAX_LINE] for match in found)
    return found[-1]["reason"] if found else "", problems


def tail(log: Path) -> tuple[str, ...]:
    """The last lines of a log that are not empty, without the paths of this machine."""
    return tuple(line[:_MAX_LINE] for line in _lines(log)[-LOG_LINES:])


def without_paths(text: str) -> str:
    """The text with absolute paths cut down to their last part."""
    return _PATH.sub(r"\1", text)


def _lines(log: Path) -> list[str]:
    text = b""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read()
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
    return [without_paths(line) for line in lines if line]
