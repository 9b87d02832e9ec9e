"""An uploaded file of examples as a value, kept as JSON beside its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec


class DataFileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file. It never changes.

    Attributes:
        id: identifier; ids sort by age.
        owner: name of the principal that uploaded it; "" if callers were not identified.
        filename: the client's name for it.
        size: number of bytes.
        digest: "sha256:" and 64 hex digits.
        created: Unix time.
        request_id: the client's own id of the upload, or "". Each owner has ids of its own.
    """

    id: str
    size: int
    digest: str
    owner: str = ""
    filename: str = ""
    created: float = 0.0
    labels: dict[str, str] = {}
    request_id: str = ""

    def is_of(self, owner: str | None) -> bool:
        """Whether the file exists for the principal `owner`; None stands for those who see all."""
        return owner in (None, self.owner)


@dataclass(frozen=True, slots=True)
class DataUpload:
    """What a client says of a file before its bytes.

    `peer` is who sends it: a principal, or an address where callers are not authenticated.
    """

    owner: str
    peer: str
    filename: str = ""
    request_id: str = ""
    labels: dict[str, str] = field(default_factory=dict)
