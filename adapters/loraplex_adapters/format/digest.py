"""An adapter's identity: SHA-256 over its two files, each preceded by its length.

The lengths keep two different pairs of files from ever being one string of bytes.
"""

from __future__ import annotations

import hashlib

from loraplex_model.base.refusal import Reason, Refusal

_PREFIX = "sha256:"
_HEX = frozenset("0123456789abcdef")


class AdapterDigest:
    """The digest in the making: the configuration first, then the weights in any pieces."""

    def __init__(self, config: bytes, weights_size: int) -> None:
        self._hash = hashlib.sha256(len(config).to_bytes(8, "little"))
        self._hash.update(config)
        self._hash.update(weights_size.to_bytes(8, "little"))

    def update(self, piece: bytes | memoryview) -> None:
        """Takes the next bytes of the weights file."""
        self._hash.update(piece)

    def text(self) -> str:
        """ "sha256:" and 64 lower-case hex digits."""
        return _PREFIX + self._hash.hexdigest()


def digest_hex(digest: str) -> str:
    """The 64 hex digits of "sha256:<hex>", which are safe as a file name.

    Raises Refusal(FIELD_INVALID, field "digest").
    """
    digits = digest.removeprefix(_PREFIX)
    if not digest.startswith(_PREFIX) or len(digits) != 64 or not _HEX.issuperset(digits):
        raise Refusal(
            Reason.FIELD_INVALID, 'a digest is "sha256:" and 64 lower-case hex digits', "digest"
        )
    return digits
