"""Keys and their file: what is kept, what is accepted, and changes that lose nothing."""

from __future__ import annotations

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from access.access_files import NOON
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_model.base import durable
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.identity import keys
from loraplex_server.access.identity.key_file import KeyFile, read_keys
from loraplex_server.access.identity.keys import KeyState
from loraplex_server.access.identity.refused import BadCredential


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


KEY, TEXT = keys.issue("search", taken={}, now=NOON)
KNOWN = {KEY.id: KEY}


def test_a_key_is_256_random_bits_with_a_prefix_and_an_id() -> None:
    prefix, key_id, secret = TEXT.split("_")
    assert (prefix, key_id) == ("lpx", KEY.id)
    assert len(bytes.fromhex(secret)) == 32
    many = [keys.issue("search", taken={}, now=NOON) for _ in range(200)]
    assert len({text.rpartition("_")[2] for _, text in many}) == 200
    assert len({key.id for key, _ in many}) == 200


def test_an_id_that_is_taken_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ids = iter(["5e", KEY.id, KEY.id, "0123456789"])
    monkeypatch.setattr(keys.secrets, "token_hex", lambda size: next(given_ids))
    assert keys.issue("search", taken=KNOWN, now=NOON)[0].id == "0123456789"


def test_what_is_kept_tells_nothing_of_the_secret(file: KeyFile) -> None:
    key, text = file.add("search", note="é日本")
    secret = text.rpartition("_")[2]
    assert secret not in file.path.read_text()
    assert secret not in repr(key)
    assert key.sha256 not in repr(key)
    assert keys.accept(text, file.read(), NOON) == key


@settings(deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.characters())
def test_a_key_with_any_other_character_is_refused(at: int, letter: str) -> None:
    changed = TEXT[:at] + letter + TEXT[at + 1 :]
    if changed == TEXT:
        assert keys.accept(changed, KNOWN, NOON) is KEY
    else:
        with pytest.raises(BadCredential) as refused:
            keys.accept(changed, KNOWN, NOON)
        secret = TEXT.rpartition("_")[2]
        assert not any(part in str(refused.value) for part in (secret[:32], secret[32:]))


@settings(deadline=None)
@given(st.text() | st.text(alphabet="lpx_0a", max_size=90))
def test_no_text_raises_anything_but_the_typed_error(text: str) -> None:
    with pytest.raises(BadCredential):
        keys.accept(text, KNOWN, NOON)


@pytest.mark.parametrize(
    ("expires", "revoked", "state"),
    [
        (None, None, KeyState.ACTIVE),
        (NOON + timedelta(microseconds=1), None, KeyState.ACTIVE),
        (NOON, None, KeyState.EXPIRED),
        (NOON - timedelta(days=1), None, KeyState.EXPIRED),
        (None, NOON - timedelta(days=1), KeyState.REVOKED),
        (None, NOON + timedelta(days=1), KeyState.REVOKED),
        (NOON - timedelta(days=1), NOON, KeyState.REVOKED),
    ],
)
def test_the_state_of_a_key(
    expires: datetime | None, revoked: datetime | None, state: KeyState
) -> None:
    key = KEY.model_copy(update={"expires": expires, "revoked": revoked})
    assert key.state(NOON) is state


def test_a_file_that_is_not_there_has_no_keys_and_is_made_for_its_owner_alone(
    tmp_path: Path,
) -> None:
    file = KeyFile(tmp_path / "deep" / "keys.json")
    assert file.read() == {}
    key, _ = file.add("search", NOON, "a note")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert file.read() == {key.id: key}
    assert (key.principal, key.expires, key.note, key.revoked) == ("search", NOON, "a note", None)


def test_revoked_is_for_good_and_told_once(file: KeyFile) -> None:
    key, _ = file.add("search")
    other, _ = file.add("search")
    revoked = file.revoke(key.id)
    assert revoked.state(NOON) is KeyState.REVOKED
    assert file.revoke(key.id) == revoked
    assert file.read() == {key.id: revoked, other.id: other}
    with pytest.raises(Refusal) as refused:
        file.revoke("0000000000")
    assert refused.value.reason is Reason.FIELD_INVALID


def test_only_keys_that_ended_long_ago_are_pruned(file: KeyFile) -> None:
    now = datetime.now(UTC)
    old, _ = file.add("a", now - timedelta(days=31))
    new, _ = file.add("b", now - timedelta(days=29))
    active, _ = file.add("c")
    later, _ = file.add("d", now + timedelta(days=900))
    revoked, _ = file.add("e")
    file.revoke(revoked.id)
    assert file.prune(now, timedelta(days=30)) == [old]
    assert file.read().keys() == {new.id, active.id, later.id, revoked.id}
    assert {k.id for k in file.prune(now + timedelta(days=1), timedelta())} == {new.id, revoked.id}
    assert file.read().keys() == {active.id, later.id}


def test_changes_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    made: list[str] = []

    def work(name: str) -> None:
        file = KeyFile(tmp_path / "keys.json")
        for _ in range(5):
            key, _ = file.add(name)
            file.revoke(key.id)
            made.append(key.id)

    threads = [threading.Thread(target=work, args=(f"p{i}",)) for i in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = KeyFile(tmp_path / "keys.json").read()
    assert found.keys() == set(made)
    assert len(made) == 30
    assert all(key.state(NOON) is KeyState.REVOKED for key in found.values())


def test_a_change_that_fails_leaves_the_file_as_it_was(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = file.add("search")
    before = file.path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "flush_file", full)
        with pytest.raises(OSError, match="No space"):
            file.revoke(key.id)
    assert file.path.read_bytes() == before
    assert sorted(p.name for p in file.path.parent.iterdir()) == ["keys.json", "keys.json.lock"]
    assert file.revoke(key.id).revoked


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "keys.json").symlink_to(tmp_path / "secret" / "real.json")
    key, _ = KeyFile(tmp_path / "keys.json").add("search")
    assert (tmp_path / "keys.json").is_symlink()
    assert read_keys(tmp_path / "secret" / "real.json") == {key.id: key}


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o644, 0o666, 0o601, 0o777])
def test_a_file_that_others_could_read_or_change_is_refused(file: KeyFile, mode: int) -> None:
    file.add("search")
    file.path.chmod(mode)
    for use in (file.read, lambda: file.add("search")):
        with pytest.raises(Refusal, match="chmod 600") as refused:
            use()
        assert refused.value.reason is Reason.CONFIG_INVALID
        assert str(file.path) in refused.value.message


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_group_may_read_the_file(file: KeyFile, mode: int) -> None:
    key, _ = file.add("search")
    file.path.chmod(mode)
    assert file.read() == {key.id: key}


def test_the_file_of_another_user_is_not_replaced(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = file.add("search")
    monkeypatch.setattr(os, "geteuid", lambda: file.path.stat().st_uid + 1)
    with pytest.raises(Refusal, match="belongs to the user"):
        file.revoke(key.id)
    assert file.read() == {key.id: key}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sha256": "0" * 63}, "keys.0.sha256: "),
        ({"sha256": None}, "keys.0.sha256: "),
        ({"id": "../../etc"}, "keys.0.id: "),
        ({"principal": ""}, "keys.0.principal: "),
        ({"created": "yesterday"}, "keys.0.created: "),
        ({"created": "2026-07-01T12:00:00"}, "keys.0.created: "),
        ({"expires": True}, "keys.0.expires: "),
        ({"note": "x" * 201}, "keys.0.note: "),
        ({"secret": "s"}, "keys.0.secret: there is no such key"),
    ],
    ids=str,
)
def test_a_damaged_file_is_refused_with_the_field(
    file: KeyFile, change: dict[str, object], told: str
) -> None:
    file.add("search")
    document = json.loads(file.path.read_text())
    document["keys"][0] |= change
    file.path.write_text(json.dumps(document))
    with pytest.raises(Refusal) as refused:
        file.read()
    assert refused.value.reason is Reason.CONFIG_INVALID
    assert told in refused.value.message


def test_a_key_that_is_there_twice_is_refused(file: KeyFile) -> None:
    key, _ = file.add("search")
    document = json.loads(file.path.read_text())
    document["keys"] *= 2
    file.path.write_text(json.dumps(document))
    with pytest.raises(Refusal, match=f"key {key.id} is there twice"):
        file.read()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b'{"version": 2, "keys": []}', b'{"version": 1, "keys": {}}',
     b"[" * 100_000, b'{"version": 1, "keys": [' + b"[" * 100_000, b"\xff\xfe", b'{"version": 1'],
)  # fmt: skip
def test_what_is_no_file_of_keys_is_refused(file: KeyFile, content: bytes) -> None:
    file.path.write_bytes(content)
    file.path.chmod(0o600)
    with pytest.raises(Refusal) as refused:
        file.read()
    assert refused.value.reason is Reason.CONFIG_INVALID


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text().map(str.encode) | st.integers(0, 200))
def test_no_bytes_raise_anything_but_the_typed_error(file: KeyFile, content: bytes | int) -> None:
    if isinstance(content, int):  # a file that was cut off
        file.path.unlink(missing_ok=True)
        file.add("search")
        content = file.path.read_bytes()[:content]
    file.path.write_bytes(content)
    file.path.chmod(0o600)
    with pytest.raises(Refusal) as refused:
        file.read()
    assert refused.value.reason is Reason.CONFIG_INVALID
    file.path.unlink()
