"""Elliptic keys in PEM files, with the hash that signatures of each curve use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_model.base.refusal import Reason, Refusal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_HASHES: Final = {256: "SHA256", 384: "SHA384", 521: "SHA512"}


def public_key(pem: bytes, what: str) -> ec.EllipticCurvePublicKey:
    """Reads a public key in PEM; `what` names it in messages. Raises Refusal(CONFIG_INVALID)."""
    serialization, ec_keys = _serialization(), _ec()
    try:
        key = serialization.load_pem_public_key(pem)
    except Exception:  # of several kinds, which depend on the damage
        raise _refused(f"{what} is not a public key in PEM") from None
    if not isinstance(key, ec_keys.EllipticCurvePublicKey) or key.curve.key_size not in _HASHES:
        raise _refused(f"{what} is not an elliptic key of the curve P-256, P-384 or P-521")
    return key


def private_key(pem: bytes, password: bytes | None, what: str) -> ec.EllipticCurvePrivateKey:
    """Reads a private key in PEM, as `public_key` does."""
    serialization, ec_keys = _serialization(), _ec()
    try:
        key = serialization.load_pem_private_key(pem, password)
    except Exception:
        raise _refused(f"{what} is not a private key in PEM, or needs a password") from None
    if not isinstance(key, ec_keys.EllipticCurvePrivateKey) or key.curve.key_size not in _HASHES:
        raise _refused(f"{what} is not an elliptic key of the curve P-256, P-384 or P-521")
    return key


def algorithm(key: ec.EllipticCurvePublicKey) -> ec.ECDSA:
    """The algorithm of signatures with a key of this curve."""
    from cryptography.hazmat.primitives import hashes

    return _ec().ECDSA(getattr(hashes, _HASHES[key.curve.key_size])())


def is_signed_by(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether `signature` of `message` was made with this key."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message, algorithm(key))
    except InvalidSignature:
        return False
    return True


# The library takes a tenth of a second to import, and only servers with a policy need it.
def _ec():  # type: ignore[no-untyped-def]
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec


def _serialization():  # type: ignore[no-untyped-def]
    from cryptography.hazmat.primitives import serialization

    return serialization


def _refused(message: str) -> Refusal:
    return Refusal(Reason.CONFIG_INVALID, message)
