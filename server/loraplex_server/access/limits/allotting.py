"""What the limits of a principal mean for the store."""

from __future__ import annotations

from loraplex_adapters.store import Allotment

from loraplex_server.access.principals import Principal


def allotment_of(
    principal: Principal, arriving_bytes: int = 0, data_bytes: int = 0
) -> Allotment | None:
    """What a principal may have in the store; None if it has no limit there.

    `arriving_bytes` are those of its unfinished uploads, `data_bytes` those of its files of
    examples for training.
    """
    limits, selector = principal.limits, principal.adapters
    if selector is None or (limits.adapters is None and limits.store_bytes is None):
        return None
    most = (limits.adapters, limits.store_bytes)
    return Allotment(principal.name, selector, *most, arriving_bytes, data_bytes)
