"""Whether a registered adapter may be served by this server, judged from its record."""

from __future__ import annotations

from loraplex_adapters.store import Quarantine, Record
from loraplex_model.base.refusal import Problem, Reason


def obstacle(record: Record) -> Problem | None:
    """The reason why no call may use the version; None if calls may."""
    if record.quarantine is not None:
        return held_back(record.id, record.quarantine)
    return None


def held_back(shown: str, quarantine: Quarantine) -> Problem:
    """The problem with quarantined content; `shown` is the adapter's id."""
    message = (
        f"{shown} is quarantined since {quarantine.since:%Y-%m-%d %H:%M} UTC: {quarantine.reason}; "
        "an operator can release it"
    )
    return Problem("", message, Reason.ADAPTER_QUARANTINED)
