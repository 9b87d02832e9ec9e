"""Why a trainer process ended without an adapter, in words that a client may read."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Reason
from loraplex_training.report.events import JobStatus

from loraplex_server.training.jobs import FailureRecord
from loraplex_server.training.progress import RunProgress

LOG_LINES: Final = 12
MAX_LINE: Final = 500
"""Number of characters of a line that a client sees."""
_TAIL_BYTES: Final = 1 << 14

_PATH: Final = re.compile(
    r"(?<![\w.>])~?(?:/[^\s/:;,'\"`()\[\]{}<>|]+)+/([^\s/:;,'\"`()\[\]{}<>|]+)"
)
"""An absolute path of at least two parts. Its last part stays visible."""


def of(status: int, progress: RunProgress, log: Path) -> FailureRecord:
    """Describes the end of a trainer that made no adapter.

    `status` is its exit status, or minus the number of the signal that ended it. The reason is that
    of its `Failed` event, if there was one.
    """
    reason, text = _verdict(status, progress)
    return FailureRecord(reason, text, tail(log))


def _verdict(status: int, progress: RunProgress) -> tuple[Reason, str]:
    ended, failed = progress.ended, progress.failed
    if ended is not None and ended.state is JobStatus.DIVERGED:
        return Reason.DIVERGED, without_paths(ended.reason) or "the loss diverged"
    if status == -signal.SIGKILL:
        at = f" at step {progress.state.step}" if progress.state else ""
        text = f"the trainer was killed{at}: most likely the machine's memory ran out"
        return Reason.OUT_OF_MEMORY, text
    if status < 0:
        with suppress(ValueError):
            text = f"the trainer was ended by {signal.Signals(-status).name}"
            return Reason.TRAINER_CRASHED, text
    if status == 0:
        return Reason.TRAINER_CRASHED, "the trainer ended without an adapter"
    if failed is not None and failed.problems:
        first, *others = failed.problems
        more = f" (and {len(others)} more)" if others else ""
        return failed.reason, without_paths(first.message)[:MAX_LINE] + more
    return Reason.TRAINER_CRASHED, f"the trainer ended with status {status}"


def tail(log: Path) -> tuple[str, ...]:
    """Returns the last non-empty lines of a log, without the paths of this machine."""
    text = b""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read()
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
    return tuple(without_paths(line)[:MAX_LINE] for line in lines if line)[-LOG_LINES:]


def without_paths(text: str) -> str:
    """Redacts a text for a client: of absolute paths, only the last part remains."""
    return _PATH.sub(r"\1", text)
