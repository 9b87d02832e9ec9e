"""What a client orders when it registers an adapter, and what it gets: a registered version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_adapters.store import Record, VersionText
from loraplex_model.base.refusal import Problem, Refusal

from loraplex_server.engine.messages import AdapterRef


@dataclass(frozen=True, slots=True)
class RegistrationTerms:
    """Name under which an adapter is registered, and the conditions.

    With `load`, a name that is replaced moves to the new content only once that is on the device,
    so that no request waits for it. If it cannot be loaded, the name does not move. `signature` is
    the file of a signature, b"" without one; `trained` says that this server made the adapter.
    """

    name: str
    replace: bool = False
    labels: Mapping[str, str] | None = None
    expected_digest: str = ""
    load: bool = False
    text: VersionText = field(default_factory=VersionText)
    signature: bytes = b""
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Registered:
    """A version of an adapter and the directory that holds its files.

    `obstacle` says why calls may not use the version; None if they may.
    """

    record: Record
    path: str
    obstacle: Problem | None = None

    @property
    def ref(self) -> AdapterRef:
        """Reference by which the engine loads the adapter."""
        return AdapterRef(self.record.digest, self.path)


def usable(adapter: Registered) -> Registered:
    """Returns the adapter. Raises Refusal, with the reason, if calls may not use it."""
    if adapter.obstacle is not None:
        raise Refusal.of([adapter.obstacle])
    return adapter
