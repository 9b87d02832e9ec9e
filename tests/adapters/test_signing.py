"""Only files that a key of the operator has signed for a name are accepted under that name."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from adapters.stores import refusal
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.signing import bundle as bundles
from loraplex_adapters.signing import read_policy, sign
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Reason, Refusal

from adapters import keys, stores

DATA = Path(__file__).with_name("data") / "signed"
INVALID = (Reason.SIGNATURE_INVALID, "signature")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.adapter(tmp_path_factory.mktemp("source") / "prod-a")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_signed_files_are_accepted_under_their_name_alone(
    curve: ec.EllipticCurve, tmp_path: Path, source: Path
) -> None:
    private = keys.make_key(tmp_path, "release", curve)
    policy = read_policy(keys.write_policy(tmp_path, release=["prod-"]))
    signature = sign(source, "prod-a", private)
    assert policy.check(source, "prod-a", signature) == "release"
    for name in ("prod-b", "prod-", "dev-a", "a"):
        assert refusal(policy.check, source, name, signature) == INVALID
    assert refusal(policy.check, source, "prod-a", b"") == INVALID


def test_a_signature_by_model_signing_is_accepted() -> None:
    """`model_signing sign key prod-a --private_key ...` wrote the file (version 1.1.1)."""
    policy = read_policy(DATA / "policy.toml")
    signature = (DATA / "prod-a" / "model.sig").read_bytes()
    assert policy.check(DATA / "prod-a", "prod-a", signature) == "release"
    assert refusal(policy.check, DATA / "prod-a", "prod-b", signature) == INVALID


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_other_files_are_refused(file: str, tmp_path: Path, source: Path) -> None:
    private = keys.make_key(tmp_path, "release")
    policy = read_policy(keys.write_policy(tmp_path, release=[""]))
    signature = sign(source, "prod-a", private)
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    data = bytearray((changed / file).read_bytes())
    data[-1] ^= 1
    (changed / file).write_bytes(data)
    assert refusal(policy.check, changed, "prod-a", signature) == INVALID


def test_a_key_signs_only_for_its_names(tmp_path: Path, source: Path) -> None:
    one, two = (keys.make_key(tmp_path, name) for name in ("one", "two"))
    stranger = keys.make_key(tmp_path / "elsewhere", "one")
    policy = read_policy(keys.write_policy(tmp_path, one=["prod-", "ops-"], two=["prod-x"]))
    accepted = {
        (who, name)
        for who, key in (("one", one), ("two", two), ("stranger", stranger))
        for name in ("prod-a", "prod-x1", "ops-a", "dev-a")
        if _accepts(policy, source, name, sign(source, name, key))
    }
    assert accepted == {
        ("one", "prod-a"),
        ("one", "prod-x1"),
        ("one", "ops-a"),
        ("two", "prod-x1"),
    }


def _accepts(policy: Any, source: Path, name: str, signature: bytes) -> bool:
    try:
        policy.check(source, name, signature)
    except Refusal as error:
        return error.reason is not Reason.SIGNATURE_INVALID
    return True


def test_names_in_signatures_need_not_be_bound(tmp_path: Path, source: Path) -> None:
    private = keys.make_key(tmp_path, "release")
    lines = ("bind_names = false", 'unsigned = ["dev-"]')
    policy = read_policy(keys.write_policy(tmp_path, *lines, release=["prod-"]))
    assert policy.check(source, "prod-b", sign(source, "anything", private)) == "release"
    assert policy.check(source, "dev-a", b"") == ""
    assert refusal(policy.check, source, "other", sign(source, "other", private)) == INVALID


def test_a_chat_template_is_accepted_only_if_it_is_signed_too(tmp_path: Path, source: Path) -> None:
    private = keys.make_key(tmp_path, "release")
    policy = read_policy(keys.write_policy(tmp_path, release=["prod-"]))
    bare = sign(source, "prod-a", private)
    assert refusal(policy.check, source, "prod-a", bare, "{{ x }}") == INVALID
    with_template = tmp_path / "with"
    shutil.copytree(source, with_template)
    (with_template / "chat_template.jinja").write_text("{{ x }}")
    signature = sign(with_template, "prod-a", private)
    assert policy.check(with_template, "prod-a", signature, "{{ x }}") == "release"
    assert policy.check(with_template, "prod-a", signature) == "release"
    assert refusal(policy.check, with_template, "prod-a", signature, "{{ y }}") == INVALID


def reshaped(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any], bytes], bytes]:
    """What signs a statement that was changed, with the right key."""

    def made(statement: dict[str, Any], private: bytes) -> bytes:
        change(statement)
        payload = json.dumps(statement).encode()
        key = bundles_key(private)
        signature = key.sign(bundles.signed_bytes(payload), ec.ECDSA(_sha256()))
        return bundles.write(payload, signature, "")

    return made


def bundles_key(private: bytes) -> ec.EllipticCurvePrivateKey:
    from loraplex_adapters.signing.keys import private_key

    return private_key(private, None, "the key")


def _sha256() -> Any:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def set_type(statement: dict[str, Any]) -> None:
    statement["_type"] = "https://in-toto.io/Statement/v0.1"


def set_predicate(statement: dict[str, Any]) -> None:
    statement["predicateType"] = "https://example.com/other"


def add_subject(statement: dict[str, Any]) -> None:
    statement["subject"] *= 2


def no_subject(statement: dict[str, Any]) -> None:
    statement["subject"] = []


def wrong_root(statement: dict[str, Any]) -> None:
    statement["subject"][0]["digest"]["sha256"] = "0" * 64


def twice(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"] *= 2


def other_hash(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"][0]["algorithm"] = "blake2b"


def shards(statement: dict[str, Any]) -> None:
    statement["predicate"]["serialization"]["method"] = "shards"


def short_digest(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"][0]["digest"] = "00"


def no_resources(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"] = []


def not_an_object(statement: dict[str, Any]) -> None:
    statement["predicate"] = 1


@pytest.mark.parametrize(
    "change",
    [
        set_type, set_predicate, add_subject, no_subject, wrong_root, twice, other_hash, shards,
        short_digest, no_resources, not_an_object,
    ],
)  # fmt: skip
def test_statements_of_another_form_are_refused_although_they_are_signed(
    change: Callable[[dict[str, Any]], None], tmp_path: Path, source: Path
) -> None:
    private = keys.make_key(tmp_path, "release")
    policy = read_policy(keys.write_policy(tmp_path, release=["prod-"]))
    envelope = json.loads(sign(source, "prod-a", private))["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    same = reshaped(lambda unchanged: None)(statement, private)
    assert policy.check(source, "prod-a", same) == "release"
    signature = reshaped(change)(statement, private)
    assert refusal(policy.check, source, "prod-a", signature) == INVALID


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, source: Path) -> tuple[Any, bytes]:
    folder = tmp_path_factory.mktemp("keys")
    private = keys.make_key(folder, "release")
    policy = read_policy(keys.write_policy(folder, release=["prod-"]))
    return policy, sign(source, "prod-a", private)


@given(st.data())
def test_no_change_of_a_signature_is_accepted_or_an_untyped_error(
    signed: tuple[Any, bytes], source: Path, data: st.DataObject
) -> None:
    policy, signature = signed
    found = json.loads(signature)["dsseEnvelope"]
    part = data.draw(st.sampled_from(["payload", "sig"]))
    text = found["payload"] if part == "payload" else found["signatures"][0]["sig"]
    raw = bytearray(base64.b64decode(text))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    changed = signature.replace(text.encode(), base64.b64encode(raw))
    assert not _accepts(policy, source, "prod-a", changed)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_whatever_is_sent_as_a_signature_is_a_typed_refusal(
    signed: tuple[Any, bytes], source: Path, data: bytes
) -> None:
    assert not _accepts(signed[0], source, "prod-a", data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"{}",
        b"null",
        b'{"mediaType": 1, "dsseEnvelope": []}',
        b" " * (bundles.MAX_BUNDLE_BYTES + 1),
    ],
)
def test_hostile_bundles_are_typed_refusals(
    data: bytes, signed: tuple[Any, bytes], source: Path
) -> None:
    assert not _accepts(signed[0], source, "prod-a", data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no key"),
        ("x", "cannot be read"),
        ("unknown = 1\n[keys.a]\npublic_key = 'a.pem'\nnames = ['']", "no setting unknown"),
        ("[keys.a]\npublic_key = 'none.pem'\nnames = ['']", "cannot be read"),
        ("[keys.a]\npublic_key = 'rsa.pem'\nnames = ['']", "not an elliptic key"),
        ("[keys.a]\npublic_key = 'policy.toml'\nnames = ['']", "not a public key"),
        ("[keys.a]\npublic_key = 'a.pem'\nnames = []", "must list"),
        ("[keys.a]\npublic_key = 'a.pem'\nnames = 'prod-'", "a list of texts"),
        ("[keys.a]\npublic_key = 'a.pem'", "and nothing else"),
        ("[keys.a]\npublic_key = 1\nnames = ['']", "name of a file"),
        ("bind_names = 1\n[keys.a]\npublic_key = 'a.pem'\nnames = ['']", "true or false"),
        ("training = 'no'\n[keys.a]\npublic_key = 'a.pem'\nnames = ['']", "training must be"),
        ("unsigned = 'a'\n[keys.a]\npublic_key = 'a.pem'\nnames = ['']", "a list of texts"),
        ("keys = 1", "names no key"),
    ],
)
def test_a_wrong_policy_names_the_file_and_the_fault(text: str, says: str, tmp_path: Path) -> None:
    keys.make_key(tmp_path, "a")
    (tmp_path / "rsa.pem").write_bytes(keys.rsa_key())
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(Refusal) as caught:
        read_policy(file)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert str(file) in caught.value.message
    assert says in caught.value.message


def test_a_key_may_stand_in_the_policy_itself(tmp_path: Path, source: Path) -> None:
    private = keys.make_key(tmp_path, "a", password=b"secret")
    pem = (tmp_path / "a.pem").read_text()
    (tmp_path / "a.pem").unlink()
    file = tmp_path / "policy.toml"
    file.write_text(f"[keys.a]\npublic_key = '''\n{pem}'''\nnames = ['']\n")
    assert refusal(sign, source, "x", private)[0] is Reason.CONFIG_INVALID
    assert read_policy(file).check(source, "x", sign(source, "x", private, b"secret")) == "a"


def test_an_alias_needs_no_less_than_its_adapter(tmp_path: Path) -> None:
    for name in ("one", "two"):
        keys.make_key(tmp_path, name)
    lines = ('unsigned = ["dev-"]',)
    policy = read_policy(keys.write_policy(tmp_path, *lines, one=["prod-", "ops-"], two=["ops-"]))
    allowed = {
        (alias, name)
        for alias in ("prod-now", "ops-now", "dev-now")
        for name in ("prod-a", "ops-a", "dev-a")
        if _allows(policy, alias, name)
    }
    assert allowed == {
        ("prod-now", "prod-a"),
        ("ops-now", "prod-a"),
        ("ops-now", "ops-a"),
        ("dev-now", "prod-a"),
        ("dev-now", "ops-a"),
        ("dev-now", "dev-a"),
    }


def _allows(policy: Any, alias: str, name: str) -> bool:
    try:
        policy.require_alias(alias, name)
    except Refusal as error:
        return error.reason is not Reason.SIGNATURE_INVALID
    return True


def test_the_store_checks_the_copy_that_it_keeps(tmp_path: Path, source: Path) -> None:
    """Files that change after the check and before the copy would otherwise be registered."""
    private = keys.make_key(tmp_path, "release")
    policy = read_policy(keys.write_policy(tmp_path, release=["prod-"]))
    signature = sign(source, "prod-a", private)
    seen: list[Path] = []

    def approve(copy: Path) -> tuple[str, ...]:
        seen.append(copy)
        return (policy.check(copy, "prod-a", signature),)

    with Store(tmp_path / "store") as store:
        record, created = store.register("prod-a", source, BASE, approve=approve)
        assert (created, record.notes[-1]) == (True, "release")
        assert seen[0] != source
        other = stores.adapter(tmp_path / "other", seed=1)
        found = refusal(store.register, "prod-a", other, BASE, replace=True, approve=approve)
        assert found == INVALID
        assert refusal(store.admit, other, BASE, approve=approve) == INVALID
        assert store.resolve("prod-a").version == 1
        assert stores.blobs(tmp_path / "store") == {record.digest}
        assert stores.rubbish(tmp_path / "store") == []
    assert os.listdir(tmp_path / "store" / "staging") == []
