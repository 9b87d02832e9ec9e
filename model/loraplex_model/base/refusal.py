"""The one error of this package."""

from __future__ import annotations


class ModelError(Exception):
    """A base model that cannot be loaded, and what to do about it.

    `reason` is a stable upper-snake-case word; `message` is for the operator and may name paths.

    Reasons: MODEL_NOT_FOUND (nothing there, or the hub does not have it), MODEL_INVALID (files are
    missing, damaged or contradict each other), MODEL_UNSUPPORTED (whole, but not a kind we run),
    MODEL_UNAVAILABLE (a download failed), CACHE_FAILED (the cache folder cannot be written).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
