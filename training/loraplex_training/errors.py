"""What can go wrong in training, for people: every error says what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class TrainError(Exception):
    """A problem of the caller's making or of the machine's, never a bug.

    Reasons: CONFIG_INVALID (an option), DATA_INVALID (lines of a data set), METHOD_INVALID (an
    option of a method, a module's name), BASE_MISMATCH (the base is not the one of a checkpoint),
    CHECKPOINT_INVALID, DISK_FULL, OUT_OF_MEMORY, DIVERGED, PUBLISH_FAILED, BUSY.

    Attributes:
        reason: one of the above.
        problems: everything that is wrong, one line each; the message is their first ones.
    """

    def __init__(self, reason: str, *problems: str) -> None:
        super().__init__("; ".join(problems[:3]))
        self.reason = reason
        self.problems: Sequence[str] = problems
