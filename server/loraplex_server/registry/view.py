"""What a caller is shown of the adapters: which ones, and what of their places in the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_adapters.store import EVERYTHING, LabelSelector, Record
from loraplex_model.base.refusal import Reason, Refusal
from msgspec import structs

from loraplex_server.access.principals import Principal
from loraplex_server.engine.messages import AdapterStatus, held_by

if TYPE_CHECKING:
    from loraplex_server.registry.registry import Registry
    from loraplex_server.registry.terms import Registered


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """An adapter: its record, None if no name points to it, and its status, None if not loaded."""

    digest: str
    record: Record | None
    status: AdapterStatus | None


@dataclass(frozen=True, slots=True)
class View:
    """The adapters as a caller is shown them.

    Attributes:
        seen: selects the adapters that exist for it.
        copies: whose copies the engine uses for it; "" for those that callers share.
    """

    seen: LabelSelector = EVERYTHING
    copies: str = ""

    @classmethod
    def of(cls, principal: Principal) -> View:
        """What a principal is shown."""
        return cls(principal.seen, principal.copies)

    def row(self, record: Record, statuses: Mapping[str, AdapterStatus]) -> AdapterRow:
        """A version, with its status among those by the engine's digests."""
        status = statuses.get(held_by(self.copies, record.digest))
        return AdapterRow(record.digest, record, self._shown(status))

    def _shown(self, status: AdapterStatus | None) -> AdapterStatus | None:
        """A status without what others did, if others may use the same copy.

        Where the copy is remains: the caller needs it to load and unload its adapters.
        """
        if status is None or self.copies or not self.seen.terms:
            return status
        return structs.replace(status, refs=0, last_used=0.0, load_seconds=0.0)


async def require_changeable(registry: Registry, adapter: Registered, principal: Principal) -> None:
    """Checks an order that changes the engine's copy of an adapter.

    Raises Refusal(PERMISSION_DENIED) if others use this copy for adapters that the principal does
    not see.
    """
    seen, digest = principal.seen, adapter.record.digest
    if not seen.terms or adapter.copies:
        return
    if await registry.read(registry.store.has_others, digest, seen):
        text = "others have adapters with the same files; only a caller with own copies may"
        raise Refusal(Reason.PERMISSION_DENIED, text)
