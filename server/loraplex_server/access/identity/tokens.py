"""Tokens: signed statements (JWT) of an issuer whose public keys are in a file (JWKS)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from joserfc import jwt
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwk import JWKRegistry, Key, KeySet, RSAKey
from joserfc.jws import JWSRegistry
from loraplex_model.base.durable import read_regular

from loraplex_server.access.identity.refused import BadCredential, unreadable, unusable

ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519", "Ed448"),
)
"""Signatures that are accepted: asymmetric ones, so that whoever can check a token cannot make one.
"""

MAX_TOKEN: Final = 8 << 10
"""Most characters of a token."""

LEEWAY: Final = 60
"""Seconds by which the clock of the issuer may be ahead of the server's."""

_MAX_FILE: Final = 1 << 20
_MIN_RSA_BITS: Final = 2048
_KEY_TYPES: Final = ("RSA", "EC", "OKP")
_SECRET_PARTS: Final = frozenset({"d", "k"})
_FOR_EVER: Final = 1 << 40
"""A Unix time after which no token expires; it would be a mistake, or no number at all."""


class TokenVerifier:
    """Checks tokens against the public keys of their issuer."""

    def __init__(self, keys: KeySet, issuer: str = "", audience: str = "") -> None:
        """If `issuer` or `audience` is set, tokens must have it (claims `iss` and `aud`)."""
        self._keys = keys
        self._registry = _Signatures(strict_check_header=False)
        self._registry.max_header_length = MAX_TOKEN
        self._registry.max_payload_length = MAX_TOKEN
        self._registry.max_signature_length = MAX_TOKEN
        self._required: dict[str, jwt.ClaimsOption] = {
            "exp": {"essential": True},
            "sub": {"essential": True},
        }
        for claim, value in (("iss", issuer), ("aud", audience)):
            if value:
                self._required[claim] = {"essential": True, "value": value}

    def subject(self, token: str, now: float) -> str:
        """The subject (claim `sub`) of a valid token.

        `now` is the Unix time. Raises BadCredential.
        """
        if len(token) > MAX_TOKEN:
            raise BadCredential(f"a token of more than {MAX_TOKEN} characters")
        if token.count(".") != 2:
            raise BadCredential("text that is neither a key nor a signed token")
        try:
            claims = jwt.decode(token, self._keys, registry=self._registry).claims
            rules = jwt.JWTClaimsRegistry(now=int(now), leeway=LEEWAY, **self._required)
            rules.validate(claims)
        except JoseError as error:
            # The text of the error may repeat parts of the token, its name does not.
            raise BadCredential(f"a token that fails: {error.error}") from None
        # The bytes are a stranger's. What else reading them raises is a fault of the token, too.
        except Exception as error:
            raise BadCredential(f"a token that is malformed ({type(error).__name__})") from None
        expires = claims["exp"]
        # The rules above let a token live for LEEWAY after its end, and for ever without a number.
        if type(expires) not in (int, float) or not now < expires < _FOR_EVER:
            raise BadCredential("a token that has expired, or whose end is no time")
        return str(claims["sub"])


class _Signatures(JWSRegistry):
    """The library's signatures, as far as they are in `ALGORITHMS`."""

    def get_alg(self, name: str) -> Any:
        """The algorithm of this name, without a warning about the name EdDSA."""
        if name not in ALGORITHMS:
            raise UnsupportedAlgorithmError(name)
        return self.algorithms[name]


def read_key_set(path: Path) -> KeySet:
    """The public keys of a JWKS file that can verify signatures; others in it are left out.

    Raises Refusal(CONFIG_INVALID), whose message has every fault of the file.
    """
    try:
        data = read_regular(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > _MAX_FILE:
        raise unusable(path, [f"has more than {_MAX_FILE >> 20} MiB"])
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unusable(path, [f"is not JSON: {error}"]) from error
    found = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise unusable(path, ['is no JWKS: an object with a list "keys"'])
    faults: list[str] = []
    usable: list[Key] = []
    for index, each in enumerate(found):
        try:
            if (key := _public_key(each)) is not None:
                usable.append(key)
        except ValueError as error:
            faults.append(f"keys.{index}: {error}")
    if not (usable or faults):
        faults.append(f"has no key for signatures of {', '.join(ALGORITHMS)}")
    if faults:
        raise unusable(path, faults)
    return KeySet(usable)


def _public_key(each: Any) -> Key | None:
    """A key of a JWKS file; None if it is for something else. Raises ValueError with its fault."""
    if not isinstance(each, dict):
        raise ValueError("is no object")
    if each.get("kty") == "oct" or _SECRET_PARTS & each.keys():
        raise ValueError("is a secret or private key; the file has public keys only")
    operations = each.get("key_ops")
    if isinstance(operations, list) and "verify" not in operations:
        return None
    if each.get("kty") not in _KEY_TYPES or each.get("use", "sig") != "sig":
        return None
    if each.get("alg") not in (None, *ALGORITHMS):
        return None
    try:
        key = JWKRegistry.import_key(each)
    except Exception as error:  # whatever the library raises of a damaged key
        raise ValueError(f"cannot be read ({type(error).__name__})") from error
    if isinstance(key, RSAKey) and key.public_key.key_size < _MIN_RSA_BITS:
        raise ValueError(f"is an RSA key of less than {_MIN_RSA_BITS} bits")
    return key
