"""Elliptic keys in PEM files, with the hash that signatures of each curve use.

The library takes a tenth of a second to import, and only servers with a policy need it, so every
function imports what it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_model.base.refusal import Reason, Refusal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_CURVES: Final = (256, 384, 521)


def public_key(pem: bytes, what: str) -> ec.EllipticCurvePublicKey:
    """Reads a public key in PEM; `what` names it in messages. Raises Refusal(CONFIG_INVALID)."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except Exception:  # of several kinds, which depend on the damage
        raise _refused(f"{what} is not a public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.key_size not in _CURVES:
        raise _refused(f"{what} is not an elliptic key of the curve P-256, P-384 or P-521")
    return key


def private_key(pem: bytes, password: bytes | None, what: str) -> ec.EllipticCurvePrivateKey:
    """Reads a private key in PEM, as `public_key` does."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, password)
    except Exception:  # as above
        raise _refused(f"{what} is not a private key in PEM, or needs a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.key_size not in _CURVES:
        raise _refused(f"{what} is not an elliptic key of the curve P-256, P-384 or P-521")
    return key


def algorithm(key: ec.EllipticCurvePublicKey) -> ec.ECDSA:
    """The algorithm of signatures with a key of this curve."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    match key.curve.key_size:
        case 256:
            return ec.ECDSA(hashes.SHA256())
        case 384:
            return ec.ECDSA(hashes.SHA384())
        case _:
            return ec.ECDSA(hashes.SHA512())


def is_signed_by(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether `signature` of `message` was made with this key."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message, algorithm(key))
    except InvalidSignature:
        return False
    return True


def _refused(message: str) -> Refusal:
    return Refusal(Reason.CONFIG_INVALID, message)
