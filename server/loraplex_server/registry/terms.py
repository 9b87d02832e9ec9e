"""What a client orders when it registers an adapter, and what it gets: a registered version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loraplex_adapters.store import EVERYTHING, Allotment, LabelSelector, Record, VersionText
from loraplex_model.base.refusal import Problem, Refusal

from loraplex_server.engine.messages import AdapterRef, held_by


@dataclass(frozen=True, slots=True)
class RegistrationTerms:
    """Name under which an adapter is registered, and the conditions.

    With `load`, a name that is replaced moves to the new content only once that is on the device,
    so that no request waits for it. If it cannot be loaded, the name does not move. A name that is
    used for a version outside of `seen` is not taken. `copies` is as in `Registered`; `allotment`
    is what the caller may have in the store. `signature` is the file of a signature, b"" without
    one; `trained` says that this server made the adapter.
    """

    name: str
    replace: bool = False
    labels: Mapping[str, str] | None = None
    expected_digest: str = ""
    load: bool = False
    text: VersionText = field(default_factory=VersionText)
    seen: LabelSelector = EVERYTHING
    copies: str = ""
    allotment: Allotment | None = None
    signature: bytes = b""
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Registered:
    """A version of an adapter and the directory that holds its files.

    `obstacle` says why calls may not use the version; None if they may. `copies` says whose copies
    the engine uses, "" for those that callers share.
    """

    record: Record
    path: str
    obstacle: Problem | None = None
    copies: str = ""

    @property
    def ref(self) -> AdapterRef:
        """Reference by which the engine loads the adapter."""
        return AdapterRef(held_by(self.copies, self.record.digest), self.path)

    def held_by(self, copies: str) -> Registered:
        """The same version for callers who use other copies."""
        return self if copies == self.copies else replace(self, copies=copies)


def usable(adapter: Registered) -> Registered:
    """Returns the adapter. Raises Refusal, with the reason, if calls may not use it."""
    if adapter.obstacle is not None:
        raise Refusal.of([adapter.obstacle])
    return adapter
