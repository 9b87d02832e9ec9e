"""What a client orders when it registers an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_adapters.store import VersionText


@dataclass(frozen=True, slots=True)
class RegistrationTerms:
    """Name under which an adapter is registered, and the conditions.

    With `load`, a name that is replaced moves to the new content only once that is on the device,
    so that no request waits for it. If it cannot be loaded, the name does not move.
    """

    name: str
    replace: bool = False
    labels: Mapping[str, str] | None = None
    expected_digest: str = ""
    load: bool = False
    text: VersionText = field(default_factory=VersionText)
