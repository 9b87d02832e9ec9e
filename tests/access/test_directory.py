"""Who a caller is: accepted credentials, refused ones, and files that change meanwhile."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from access.access_files import (
    NOON,
    PRINCIPALS,
    Clock,
    bearer,
    directory,
    replace,
    settings,
    why_refused,
)
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.identity import directory as module
from loraplex_server.access.identity.credentials import Credentials
from loraplex_server.access.identity.directory import open_directory
from loraplex_server.access.identity.key_file import KeyFile
from loraplex_server.access.identity.watched_file import WatchedFile
from loraplex_server.series import Series
from loraplex_server.settings import ServerSettings
from prometheus_client import CollectorRegistry


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def test_nobody_is_identified_where_no_file_of_principals_is_set() -> None:
    assert open_directory(ServerSettings()) is None


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer  {} "])
def test_a_key_identifies_its_principal(tmp_path: Path, keys: KeyFile, form: str) -> None:
    _, search = keys.add("search")
    _, also_search = keys.add("search", note="the second one")
    _, ops = keys.add("ops")
    known = directory(tmp_path)
    for text, name in ((search, "search"), (also_search, "search"), (ops, "ops")):
        found = known.identify(Credentials(form.format(text)))
        assert found is known.principals[name]
        assert found.name == name


def test_a_certificate_identifies_its_principal_by_any_of_its_names(tmp_path: Path) -> None:
    known = directory(tmp_path)
    names = frozenset({"search.example", "10.0.0.1"})
    assert known.identify(Credentials(certificate=names)).name == "search"
    names = frozenset({"ops.example", "ops-2.example"})
    assert known.identify(Credentials(certificate=names)).name == "ops"


def test_a_call_without_credentials_is_told_that_it_needs_one(tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        directory(tmp_path).identify(Credentials())
    assert refused.value.reason is Reason.CREDENTIALS_MISSING


def test_a_bearer_decides_even_if_the_certificate_would_do(tmp_path: Path, keys: KeyFile) -> None:
    _, text = keys.add("ops")
    certificate = frozenset({"search.example"})
    known = directory(tmp_path)
    assert known.identify(Credentials(f"Bearer {text}", certificate)).name == "ops"
    wrong = text[:-1] + ("0" if text[-1] != "0" else "1")
    why_refused(known, Credentials(f"Bearer {wrong}", certificate))
    why_refused(known, Credentials("Basic x", certificate))


def test_all_bad_credentials_are_refused_alike_and_only_the_cause_says_why(
    tmp_path: Path, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = []
    expired, expired_text = keys.add("search", expires=NOON)
    revoked, revoked_text = keys.add("search")
    keys.revoke(revoked.id)
    gone, gone_text = keys.add("nobody")
    key, text = keys.add("search")
    known = directory(tmp_path, Clock())
    secret = text.rpartition("_")[2]
    wrong = secret[::-1]
    cases = {
        f"Bearer {expired_text}": f"key {expired.id} of search, which is expired",
        f"Bearer {revoked_text}": f"key {revoked.id} of search, which is revoked",
        f"Bearer {gone_text}": f"key {gone.id} of nobody, who is no principal now",
        f"Bearer lpx_{key.id}_{wrong}": f"key {key.id}, with a wrong secret",
        f"Bearer lpx_0000000000_{secret}": "key 0000000000, which is unknown",
        f"Bearer lpx_{key.id}_{secret.upper()}": "malformed",
        f"Bearer {text}\n": "malformed",
        f"Bearer {text}x": "malformed",
        f"Bearer lpx_{key.id}": "malformed",
        f"Bearer {secret}": "malformed",
        "Bearer": "malformed",
        "Bearer ": "malformed",
        "Bearer é日本\x00": "malformed",
        f"Basic {text}": "does not begin with Bearer",
        text: "does not begin with Bearer",
        " ": "does not begin with Bearer",
        "Bearer " + "x" * 10_000: "more than",
        "x" * 1_000_000: "more than",
    }
    for authorization, why in cases.items():
        told.append(why_refused(known, Credentials(authorization)))
        assert why in told[-1], authorization[:100]
    assert "is no principal's: a, b" in why_refused(
        known, Credentials(certificate=frozenset({"a", "b"}))
    )
    both = frozenset({"search.example", "ops.example"})
    assert "several principals: ops, search" in why_refused(known, Credentials(certificate=both))
    # Anybody can cause these at any rate, so none has a line of the log; the audit log bounds them.
    assert not caplog.records
    for each in (secret, wrong, secret.upper(), *(t[15:] for t in (expired_text, gone_text))):
        assert not any(each in text for text in told)


def test_a_key_that_is_revoked_is_refused_after_a_refresh(tmp_path: Path, keys: KeyFile) -> None:
    key, text = keys.add("search")
    _, other = keys.add("search")
    known = directory(tmp_path)
    assert known.identify(bearer(text)).name == "search"
    keys.revoke(key.id)
    assert known.refresh()
    assert "revoked" in why_refused(known, bearer(text))
    assert known.identify(bearer(other)).name == "search"
    _, later = keys.add("ops")
    assert known.refresh()
    assert known.identify(bearer(later)).name == "ops"


def test_a_key_ends_at_its_time_and_no_clock_brings_back_a_revoked_one(
    tmp_path: Path, keys: KeyFile
) -> None:
    clock = Clock()
    key, text = keys.add("search", expires=NOON + timedelta(seconds=1))
    known = directory(tmp_path, clock)
    assert known.identify(bearer(text)).name == "search"
    clock.advance(seconds=1)
    assert "expired" in why_refused(known, bearer(text))
    clock.advance(seconds=-1)
    assert known.identify(bearer(text)).name == "search"
    keys.revoke(key.id)
    assert known.refresh()
    clock.advance(days=-1000)
    assert "revoked" in why_refused(known, bearer(text))


def test_principals_that_change_are_taken_in_as_a_whole(tmp_path: Path, keys: KeyFile) -> None:
    _, text = keys.add("search")
    known = directory(tmp_path)
    before = known.identify(bearer(text))
    assert known.refresh()
    assert known.identify(bearer(text)) is before, "nothing has changed"
    file = tmp_path / "principals.toml"
    replace(file, PRINCIPALS.replace('"read"]', '"read", "admin"]'))
    assert known.identify(bearer(text)) is before
    assert known.refresh()
    assert "admin" in known.identify(bearer(text)).roles
    replace(file, PRINCIPALS.replace("principals.search", "principals.find"))
    assert known.refresh()
    assert "no principal now" in why_refused(known, bearer(text))
    assert known.identify(Credentials(certificate=frozenset({"search.example"}))).name == "find"
    assert set(known.principals) == {"find", "ops"}


@pytest.mark.parametrize("name", ["principals.toml", "keys.json"])
@pytest.mark.parametrize(
    "damage", ["empty", "bytes", "half", "gone", "folder", "unreadable", "shared"]
)
def test_a_file_that_is_wrong_changes_nothing_and_is_reported_once(
    tmp_path: Path, keys: KeyFile, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "shared" and name != "keys.json":
        pytest.skip("only the file of keys must be private")
    _, text = keys.add("search")
    known = directory(tmp_path)
    file = tmp_path / name
    good = file.read_bytes()
    match damage:
        case "empty":
            replace(file, b"")
        case "bytes":
            replace(file, b"\xff\x00[")
        case "half":
            replace(file, good[: len(good) // 2])
        case "gone":
            file.unlink()
        case "folder":
            file.unlink()
            file.mkdir()
        case "unreadable":
            file.unlink()
            file.symlink_to(file)  # permissions do not stop a test that root runs
        case "shared":
            file.chmod(0o604)
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert not known.refresh()
        assert known.identify(bearer(text)).name == "search"
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert str(file) in errors[0]
    if file.is_dir():
        file.rmdir()
    replace(file, good)
    assert known.refresh()
    assert known.identify(bearer(text)).name == "search"


def test_a_fault_in_one_file_does_not_keep_a_key_of_another_from_being_revoked(
    tmp_path: Path, keys: KeyFile
) -> None:
    key, text = keys.add("search")
    known = directory(tmp_path)
    replace(tmp_path / "principals.toml", "wrong")
    assert not known.refresh()
    keys.revoke(key.id)
    assert not known.refresh()
    assert "revoked" in why_refused(known, bearer(text))


def test_keys_may_be_made_after_the_start(tmp_path: Path, keys: KeyFile) -> None:
    known = directory(tmp_path)
    assert known.refresh()
    _, text = keys.add("search")
    assert known.refresh()
    assert known.identify(bearer(text)).name == "search"


def test_a_file_is_read_only_when_it_has_changed(tmp_path: Path) -> None:
    file, reads = tmp_path / "file", []

    def read(path: Path) -> str:
        reads.append(path)
        return path.read_text()

    file.write_text("one")
    watched = WatchedFile(file, read)
    assert [watched.refresh() for _ in range(3)] == [False] * 3
    assert len(reads) == 1
    replace(file, "two")
    assert [watched.refresh() for _ in range(3)] == [True, False, False]
    assert (watched.value, len(reads)) == ("two", 2)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    replacements = ["two", "three"]

    def read(path: Path) -> str:
        content = path.read_text()
        if replacements:
            replace(file, replacements.pop(0))
        return content

    watched = WatchedFile(file, read)
    seen = [watched.value]
    while watched.refresh():
        seen.append(watched.value)
    assert seen == ["one", "two", "three"]


def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(tmp_path: Path) -> None:
    """Nothing about the file changes when the disk answers again."""
    file, faults = tmp_path / "file", [""]

    def read(path: Path) -> str:
        if fault := faults.pop(0):
            raise Refusal(Reason.CONFIG_INVALID, fault)
        return path.read_text()

    file.write_text("one")
    watched = WatchedFile(file, read)
    replace(file, "two")
    faults += ["input/output error", "input/output error", ""]
    assert [(watched.refresh(), watched.value, watched.fault) for _ in range(4)] == [
        (False, "one", "input/output error"),
        (False, "one", "input/output error"),
        (True, "two", ""),
        (False, "two", ""),
    ]


def test_files_of_a_mounted_secret_change_by_their_links(tmp_path: Path) -> None:
    """Kubernetes puts new files into a new folder and turns a link to it, whose target is read."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "..data").symlink_to("first")
    (tmp_path / "file").symlink_to("..data/file")
    watched = WatchedFile(tmp_path / "file", Path.read_text)
    assert watched.value == "first"
    (tmp_path / "..fresh").symlink_to("second")
    (tmp_path / "..fresh").rename(tmp_path / "..data")
    assert watched.refresh()
    assert watched.value == "second"


def test_calls_are_identified_while_files_change(tmp_path: Path, keys: KeyFile) -> None:
    """Every call sees one state of the file of principals, and none fails."""
    _, text = keys.add("search")
    known = directory(tmp_path)
    prefixes, stop, failed = {"", "one-"}, threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            try:
                found = known.identify(bearer(text))
                assert found.name_prefix in prefixes
            except Exception as error:
                failed.append(error)
                return

    callers = [threading.Thread(target=call) for _ in range(2)]
    for each in callers:
        each.start()
    for turn in range(40):
        prefix = 'name_prefix = "one-"' if turn % 2 else ""
        replace(
            tmp_path / "principals.toml",
            PRINCIPALS.replace("certificates", f"{prefix}\ncertificates", 1),
        )
        assert known.refresh()
    stop.set()
    for each in callers:
        each.join()
    assert not failed


async def test_the_server_looks_at_the_files_by_itself_and_shows_faults_in_the_metrics(
    tmp_path: Path, keys: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.01)
    key, text = keys.add("search")
    known = directory(tmp_path)
    registry = CollectorRegistry()
    watching = asyncio.create_task(known.watch(Series(registry)))

    async def until(good: bool) -> None:
        name = "loraplex_access_reload_failed"
        while registry.get_sample_value(name) != float(not good):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    try:
        await until(True)
        replace(tmp_path / "principals.toml", "wrong")
        await until(False)
        replace(tmp_path / "principals.toml", PRINCIPALS)
        await until(True)
        keys.revoke(key.id)
        while True:
            try:
                known.identify(bearer(text))
            except Refusal:
                break
            await asyncio.sleep(0.01)
    finally:
        watching.cancel()


@pytest.mark.parametrize("name", ["principals.toml", "keys.json", "jwks.json"])
def test_a_server_does_not_start_with_a_wrong_file_and_names_it(tmp_path: Path, name: str) -> None:
    given = settings(tmp_path, jwks=tmp_path / "jwks.json")
    (tmp_path / "jwks.json").write_text('{"keys": []}')
    replace(tmp_path / name, "{ wrong")
    with pytest.raises(Refusal) as refused:
        open_directory(given)
    assert refused.value.reason is Reason.CONFIG_INVALID
    assert str(tmp_path) in refused.value.message
