"""Whether a registered adapter may be served by this server, judged from its record."""

from __future__ import annotations

from loraplex_adapters.store import Quarantine, Record
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason

_HEX = 12


def obstacle(record: Record, base: BaseInfo) -> Problem | None:
    """The reason why no call may use the version while `base` is served; None if calls may.

    A version that was registered before fingerprints were recorded is served: its shapes are
    compared with the base when it is loaded, as are the stamps in its files.
    """
    if record.quarantine is not None:
        return held_back(record.id, record.quarantine)
    if not record.is_described:
        message = f"the description of {record.id} in the store is damaged; register it again"
        return Problem("", message, Reason.ADAPTER_CORRUPT)
    return other_base(record, base)


def other_base(record: Record, base: BaseInfo) -> Problem | None:
    """The problem with a version that was registered for another base than `base`; else None."""
    if record.base_fingerprint in ("", base.fingerprint):
        return None
    message = (
        f"{record.id} was registered for the base model "
        f"{base_text(record.base_name, record.base_fingerprint)}, and this is "
        f"{base_text(base.name, base.fingerprint)}. An operator can check it against this base "
        "with `loraplex-server store rebase`"
    )
    return Problem("", message, Reason.BASE_MODEL_MISMATCH)


def held_back(shown: str, quarantine: Quarantine) -> Problem:
    """The problem with quarantined content; `shown` is the adapter's id."""
    message = (
        f"{shown} is quarantined: {quarantine.reason} (since {quarantine.since:%Y-%m-%d %H:%M} "
        "UTC). An operator can release it with `loraplex-server store release`"
    )
    return Problem("", message, Reason.ADAPTER_QUARANTINED)


def base_text(name: str, fingerprint: str) -> str:
    """A base model for people, such as "tiny (3f2a9c01b7d4)": its name and the first hex digits."""
    digits = fingerprint.removeprefix("sha256:")[:_HEX]
    return f"{name} ({digits})" if name else digits or "unknown"
