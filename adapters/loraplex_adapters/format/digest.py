"""An adapter's identity: SHA-256 over its two files, each preceded by its length.

Thanks to the lengths, two different pairs of files never yield the same sequence of bytes.
"""

from __future__ import annotations

import hashlib

from loraplex_model.base.refusal import Reason, Refusal

_PREFIX = "sha256:"
_HEX = frozenset("0123456789abcdef")


class AdapterDigest:
    """Computes a digest from the configuration and then the weights, in pieces of any size."""

    def __init__(self, config: bytes, weights_size: int) -> None:
        self._hash = hashlib.sha256(len(config).to_bytes(8, "little"))
        self._hash.update(config)
        self._hash.update(weights_size.to_bytes(8, "little"))

    def update(self, piece: bytes | memoryview) -> None:
        """Adds the next bytes of the weights file."""
        self._hash.update(piece)

    def text(self) -> str:
        """Returns the digest as "sha256:" and 64 lower-case hex digits."""
        return _PREFIX + self._hash.hexdigest()


def digest_hex(digest: str) -> str:
    """Returns the 64 hex digits of "sha256:<hex>", which are safe as a file name.

    Raises Refusal(FIELD_INVALID, field "digest").
    """
    digits = digest.removeprefix(_PREFIX)
    if not digest.startswith(_PREFIX) or len(digits) != 64 or not _HEX.issuperset(digits):
        message = 'a digest is "sha256:" and 64 lower-case hex digits'
        raise Refusal(Reason.FIELD_INVALID, message, "digest")
    return digits


def is_digest(text: str) -> bool:
    """Whether `text` is "sha256:<64 hex digits>"."""
    try:
        digest_hex(text)
    except Refusal:
        return False
    return True
