"""Signed tokens: which are accepted, and that all others are refused alike."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from access.access_files import NOON, Clock, bearer, directory, replace, why_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jws, jwt
from joserfc.jwk import ECKey, Key, KeySet, OctKey, OKPKey, RSAKey
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.identity.key_file import KeyFile
from loraplex_server.access.identity.refused import BadCredential
from loraplex_server.access.identity.tokens import (
    ALGORITHMS,
    MAX_TOKEN,
    TokenVerifier,
    read_key_set,
)

NOW = int(NOON.timestamp())
CLAIMS = {"sub": "auth0|7", "exp": NOW + 300}

RSA = RSAKey.generate_key(2048, {"kid": "rsa"})
EC = {size: ECKey.generate_key(f"P-{size}", {"kid": f"ec{size}"}) for size in (256, 384, 521)}
EDWARDS = {name: OKPKey.generate_key(name, {"kid": name}) for name in ("Ed25519", "Ed448")}
STRANGER = RSAKey.generate_key(2048, {"kid": "rsa"})

SIGNERS: dict[str, Key] = {
    **{f"{kind}{size}": RSA for kind in ("RS", "PS") for size in (256, 384, 512)},
    **{"ES256": EC[256], "ES384": EC[384], "ES512": EC[521]},
    **{"EdDSA": EDWARDS["Ed25519"], **EDWARDS},
}
ALL_KEYS = [RSA, *EC.values(), *EDWARDS.values()]
KNOWN = TokenVerifier(KeySet(ALL_KEYS))


def public(*keys: Key) -> dict[str, Any]:
    """The JWKS of keys."""
    return {"keys": [key.as_dict(private=False) for key in keys]}


def verifier(folder: Path, *keys: Key, **required: str) -> TokenVerifier:
    (folder / "jwks.json").write_text(json.dumps(public(*keys)))
    return TokenVerifier(read_key_set(folder / "jwks.json"), **required)


def signed(claims: Any, alg: str = "RS256", key: Key = RSA, **header: Any) -> str:
    """A token of any claims, however wrong."""
    text = claims if isinstance(claims, str) else json.dumps(claims)
    given_header = {"alg": alg, "kid": key.kid, **header}
    registry = jws.JWSRegistry(algorithms=list(jws.JWSRegistry.algorithms))
    registry.strict_check_header = False
    return jws.serialize_compact(given_header, text, key, registry=registry)


def part(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> TokenVerifier:
    """Accepts all algorithms, whoever issued the token."""
    return verifier(tmp_path_factory.mktemp("jwks"), *ALL_KEYS)


def refused(checks: TokenVerifier, token: str, now: float = NOW) -> str:
    """Why a token is refused. The words must repeat no part of it that is long enough to matter."""
    with pytest.raises(BadCredential) as found:
        checks.subject(token, now)
    assert not any(part in str(found.value) for part in token.split(".") if len(part) > 20)
    return str(found.value)


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_every_asymmetric_signature_is_accepted_from_its_key_alone(
    checks: TokenVerifier, alg: str
) -> None:
    token = signed(CLAIMS, alg, SIGNERS[alg])
    assert checks.subject(token, NOW) == "auth0|7"
    head, claims, signature = token.split(".")
    other = part({**CLAIMS, "sub": "admin"})
    assert "bad_signature" in refused(checks, f"{head}.{other}.{signature}")
    assert refused(checks, f"{head}.{claims}.")
    assert refused(checks, f"{head}.{claims}.{signature[:-4]}")


def test_a_token_of_a_stranger_with_the_right_key_id_is_refused(checks: TokenVerifier) -> None:
    assert "bad_signature" in refused(checks, signed(CLAIMS, key=STRANGER))


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "HS256", "HS384", "HS512", "ES256K", ""])
def test_a_token_that_anybody_can_make_is_refused(checks: TokenVerifier, alg: str) -> None:
    """Among them the classic: the public key, which all know, used as the secret of an HMAC."""
    secret = RSA.as_pem(private=False)
    body = f"{part({'alg': alg, 'kid': 'rsa'})}.{part(CLAIMS)}"
    mac = hmac.new(secret, body.encode(), hashlib.sha256).digest()
    for signature in ("", base64.urlsafe_b64encode(mac).rstrip(b"=").decode()):
        assert refused(checks, f"{body}.{signature}")


def test_an_algorithm_is_not_accepted_from_a_key_of_another_kind(checks: TokenVerifier) -> None:
    for alg, key in (("ES256", RSA), ("RS256", EC[256]), ("ES384", EC[256]), ("Ed25519", RSA)):
        body = f"{part({'alg': alg, 'kid': key.kid})}.{part(CLAIMS)}"
        assert refused(checks, f"{body}.{signed(CLAIMS).split('.')[2]}")


@pytest.mark.parametrize(
    ("claims", "accepted"),
    [
        ({"exp": NOW + 1}, True),
        ({"exp": NOW + 0.5}, True),
        ({"exp": NOW}, False),
        ({"exp": NOW - 59}, False),
        ({"exp": -1}, False),
        ({"exp": None}, False),
        ({"exp": True}, False),
        ({"exp": str(NOW + 10)}, False),
        ({"exp": [NOW + 10]}, False),
        ({"exp": float("inf")}, False),
        ({"exp": float("nan")}, False),
        ({"exp": 10**400}, False),
        ({"nbf": NOW + 60}, True),
        ({"nbf": NOW + 61}, False),
        ({"nbf": "x"}, False),
        ({"iat": NOW + 60}, True),
        ({"iat": NOW + 61}, False),
        ({"iat": NOW - 10**6}, True),
        ({"sub": ""}, False),
        ({"sub": None}, False),
        ({"sub": 7}, False),
        ({"sub": ["auth0|7"]}, False),
        ({"aud": "anybody", "iss": "anybody", "extra": {"deep": [1]}}, True),
    ],
    ids=str,
)
def test_the_claims_that_a_token_needs(
    checks: TokenVerifier, claims: dict[str, Any], accepted: bool
) -> None:
    token = signed({**CLAIMS, **claims})
    if accepted:
        assert checks.subject(token, NOW) == "auth0|7"
    else:
        assert refused(checks, token)


@pytest.mark.parametrize("name", ["sub", "exp"])
def test_a_token_without_a_subject_or_an_end_is_refused(checks: TokenVerifier, name: str) -> None:
    assert "missing_claim" in refused(
        checks, signed({key: value for key, value in CLAIMS.items() if key != name})
    )


def test_issuer_and_audience_are_required_where_they_are_set(tmp_path: Path) -> None:
    checks = verifier(tmp_path, RSA, issuer="https://id.example", audience="loraplex")
    good = {**CLAIMS, "iss": "https://id.example", "aud": "loraplex"}
    assert checks.subject(signed(good), NOW) == "auth0|7"
    assert checks.subject(signed({**good, "aud": ["other", "loraplex"]}), NOW) == "auth0|7"
    for wrong in (
        {"iss": "https://id.example/"},
        {"iss": None},
        {"aud": "other"},
        {"aud": ["other"]},
        {"aud": []},
        {"aud": None},
        {"aud": {"loraplex": 1}},
    ):
        assert refused(checks, signed({**good, **wrong}))


def test_a_key_id_may_be_left_out_where_there_is_one_key(tmp_path: Path) -> None:
    token = signed(CLAIMS)
    bare = jwt.encode({"alg": "RS256"}, CLAIMS, RSA)
    one = verifier(tmp_path, RSA)
    assert one.subject(token, NOW) == one.subject(bare, NOW) == "auth0|7"
    several = verifier(tmp_path, RSA, EC[256])
    assert several.subject(token, NOW) == "auth0|7"
    assert refused(several, bare)
    assert refused(several, signed(CLAIMS, kid="unknown"))


@pytest.mark.parametrize(
    "header",
    [
        {"kid": 5}, {"kid": ["rsa"]}, {"kid": {"a": 1}}, {"alg": ["RS256"]}, {"alg": None},
        {"alg": {}}, {"crit": ["exp"]}, {"crit": 1}, {"crit": []}, {"b64": "x", "crit": ["b64"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_header_is_refused(checks: TokenVerifier, header: dict[str, Any]) -> None:
    body = f"{part({'alg': 'RS256', 'kid': 'rsa', **header})}.{part(CLAIMS)}"
    assert refused(checks, f"{body}.{signed(CLAIMS).split('.')[2]}")


def test_a_header_with_more_than_is_needed_is_accepted(checks: TokenVerifier) -> None:
    token = signed(CLAIMS, typ="at+jwt", nonce="x" * 1000, jku="https://evil.example/keys")
    assert checks.subject(token, NOW) == "auth0|7"


def test_hostile_texts_are_refused(checks: TokenVerifier) -> None:
    deep = "[" * 5000
    end = signed(CLAIMS).split(".")[2]
    for token in (
        "", ".", "..", "...", "a.b.c", "é.日.本", "\x00.\x00.\x00", f"{part(deep)}.x.x",
        f"{part(deep + ']' * 5000)}.x.x"[:MAX_TOKEN], f"{part('{}')}..", f"{part('[]')}.x.x",
        f"{part('null')}.x.x", f"{part({'alg': 'RS256', 'kid': 'rsa'})}.{part(deep)}.{end}",
        "x" * (MAX_TOKEN + 1), "a.b.c" * 10**6, "\ud800.\ud800.\ud800",
    ):  # fmt: skip
        assert refused(checks, token)
    assert "no text" not in refused(checks, signed('"text"'))
    assert refused(checks, signed("[1, 2"))
    assert refused(checks, signed("[" * 4000))
    assert "more than" in refused(checks, "x" * (MAX_TOKEN + 1))


@settings(deadline=None)
@given(
    st.text() | st.text(alphabet="eyJhbGciOi.-_0=") | st.lists(st.binary(), min_size=3, max_size=3)
)
def test_no_text_raises_anything_but_the_typed_error(text: str | list[bytes]) -> None:
    if isinstance(text, list):
        text = ".".join(base64.urlsafe_b64encode(each).rstrip(b"=").decode() for each in text)
    with pytest.raises(BadCredential):
        KNOWN.subject(text, NOW)


@settings(deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["sub", "exp", "nbf", "iat", "aud", "iss", "x"]), inner, max_size=5),
    max_leaves=8,
))  # fmt: skip
def test_no_signed_claims_raise_anything_but_the_typed_error(claims: Any) -> None:
    token = signed(claims, "Ed25519", EDWARDS["Ed25519"])
    try:
        subject = KNOWN.subject(token, NOW)
    except BadCredential:
        return
    assert isinstance(claims, dict)
    assert claims["sub"] == subject
    assert claims["exp"] > NOW


def test_the_subject_of_a_token_chooses_the_principal(tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_text(json.dumps(public(RSA)))
    _, key = KeyFile(tmp_path / "keys.json").add("ops")
    known = directory(tmp_path, clock := Clock(), jwks=tmp_path / "jwks.json")
    token = signed(CLAIMS)
    assert known.identify(bearer(token)).name == "search"
    assert known.identify(bearer(key)).name == "ops"
    why = why_refused(known, bearer(signed({**CLAIMS, "sub": "somebody"})))
    assert "'somebody' is no principal's" in why
    assert "neither a key nor" in why_refused(known, bearer("x"))
    clock.advance(seconds=300)
    assert token not in why_refused(known, bearer(token))


def test_keys_of_the_issuer_change_while_the_server_runs(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(public(RSA)))
    known = directory(tmp_path, jwks=file)
    assert known.identify(bearer(signed(CLAIMS))).name == "search"
    replace(file, json.dumps(public(EC[256])))
    assert known.refresh()
    assert why_refused(known, bearer(signed(CLAIMS)))
    assert known.identify(bearer(signed(CLAIMS, "ES256", EC[256]))).name == "search"
    replace(file, '{"keys": ')
    assert not known.refresh()
    assert known.identify(bearer(signed(CLAIMS, "ES256", EC[256]))).name == "search"


def changed(key: Key, **more: Any) -> dict[str, Any]:
    return {**key.as_dict(private=False), **more}


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no JWKS"),
        ('{"keys": {}}', "is no JWKS"),
        ('{"keys": []}', "has no key for signatures"),
        ({"keys": [1, RSA.as_dict(private=False)]}, "keys.0: is no object"),
        ({"keys": [RSA.as_dict(private=True)]}, "keys.0: is a secret or private key"),
        ({"keys": [EC[256].as_dict(private=True)]}, "keys.0: is a secret or private key"),
        ({"keys": [OctKey.generate_key().as_dict()]}, "keys.0: is a secret or private key"),
        ({"keys": [{"kty": "RSA", "n": "AQAB"}]}, "keys.0: cannot be read"),
        ({"keys": [{"kty": "RSA", "n": 5, "e": []}]}, "keys.0: cannot be read"),
        ({"keys": [{"kty": "EC", "crv": "P-0", "x": "", "y": ""}]}, "keys.0: cannot be read"),
        ({"keys": [{"kty": ["RSA"]}]}, "has no key for signatures"),
        (" " * (1 << 20) + "1", "has more than 1 MiB"),
    ],
    # Generated keys would give the tests other names in every run.
    ids=lambda value: value[:40] if isinstance(value, str) else "keys",
)
def test_a_wrong_key_set_is_refused_with_its_fault(
    tmp_path: Path, document: Any, told: str
) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(Refusal) as found:
        read_key_set(file)
    assert found.value.reason is Reason.CONFIG_INVALID
    assert told in found.value.message
    assert str(file) in found.value.message


def test_a_weak_key_is_refused(tmp_path: Path) -> None:
    with pytest.warns(match="2048"):
        weak = RSAKey.generate_key(1024)
    with pytest.raises(Refusal, match="less than 2048 bits"):
        verifier(tmp_path, weak)


def test_keys_for_something_else_are_left_out(tmp_path: Path) -> None:
    others = [
        changed(EC[256], kid="1", use="enc"),
        changed(EC[256], kid="2", key_ops=["encrypt"]),
        changed(EC[256], kid="3", alg="ECDH-ES"),
        {"kty": "AKP", "kid": "4", "alg": "ML-DSA-44", "pub": "x"},
    ]
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [*others, changed(RSA, use="sig", alg="RS256")]}))
    assert [key.kid for key in read_key_set(file)] == ["rsa"]
    checks = TokenVerifier(read_key_set(file))
    assert checks.subject(signed(CLAIMS), NOW) == "auth0|7"
    assert refused(checks, signed(CLAIMS, "PS256")), "the key is for RS256"
