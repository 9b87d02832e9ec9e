"""The one error of this package."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with an adapter; the words mean what they mean in `AdapterError`."""

    reason: str
    message: str
    field: str = ""


class AdapterError(Exception):
    """An adapter that cannot be used, and why.

    `reason` is a stable upper-snake-case word of the error table (docs/operations.md); `field`
    names what is at fault (a configuration key, a tensor, a file); `message` is safe to show to a
    client. `findings` lists everything that was found wrong, this first; it is never empty.
    """

    def __init__(
        self, reason: str, message: str, field: str = "", findings: tuple[Finding, ...] = ()
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.findings = findings or (Finding(reason, message, field),)

    @classmethod
    def of(cls, findings: tuple[Finding, ...]) -> AdapterError:
        """The error for a non-empty list of findings; the first one speaks for all."""
        first = findings[0]
        return cls(first.reason, first.message, first.field, findings)
