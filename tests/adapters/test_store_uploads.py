"""Uploads resume where they stopped, across restarts and within limits, and are registered."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from adapters.stores import adapters, blobs, refusal, rubbish
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Store, Upload, UploadBounds

BOUNDS = UploadBounds(max_weights_bytes=1 << 16, max_open=3)
UNKNOWN = "0" * 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Any:
    with Store(root, uploads=BOUNDS) as opened:
        yield opened


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters(tmp_path_factory.mktemp("source"), 1)[0]


@pytest.fixture(scope="module")
def digest(source: Path) -> str:
    return inspect(source, BASE).digest


def send(store: Store, upload: str, source: Path, piece: int = 1000) -> None:
    """Sends the bytes that the store does not have yet."""
    there = store.uploads.state(upload)
    for file, size in ((CONFIG_FILE, there.config_bytes), (WEIGHTS_FILE, there.weights_bytes)):
        data = (source / file).read_bytes()
        for start in range(size, len(data), piece):
            end = min(start + piece, len(data))
            assert store.uploads.append(upload, file, start, data[start:end]) == end


def age(root: Path, upload: str) -> None:
    folder = root / "uploads" / upload
    for file in (*folder.iterdir(), folder):
        os.utime(file, (1, 1))


def test_an_upload_goes_on_after_a_restart_and_ends_as_a_registration(
    root: Path, source: Path, digest: str
) -> None:
    data = (source / WEIGHTS_FILE).read_bytes()
    with Store(root) as store:
        upload = store.uploads.begin()
        assert store.uploads.append(upload, WEIGHTS_FILE, 0, data[:1500]) == 1500
    with Store(root) as store:
        assert store.uploads.state(upload) == Upload(upload, 0, 1500)
        send(store, upload, source)
        with store.uploads.reading(upload) as directory:
            assert inspect(directory, BASE).digest == digest
        record, created = store.finish_upload(upload, "a", digest, BASE, labels={"by": "hand"})
        assert (record.id, record.digest, created) == ("a@1", digest, True)
        assert record.labels == {"by": "hand"}
        store.verify(digest)
        assert refusal(store.uploads.state, upload) == ("UPLOAD_NOT_FOUND", upload)
        assert not rubbish(root)


def test_a_piece_that_does_not_follow_is_refused_with_the_right_offset(store: Store) -> None:
    upload = store.uploads.begin()
    store.uploads.append(upload, CONFIG_FILE, 0, b"{}")
    for wrong in (0, 1, 3, -1, 1 << 62):
        with pytest.raises(Exception, match="has 2 bytes") as refused:
            store.uploads.append(upload, CONFIG_FILE, wrong, b"x")
        assert refused.value.reason == "UPLOAD_OFFSET"  # type: ignore[attr-defined]
    assert store.uploads.state(upload) == Upload(upload, 2, 0)


def test_of_two_who_send_the_same_piece_one_writes_it(store: Store, root: Path) -> None:
    upload = store.uploads.begin()

    def append(_: int) -> str:
        try:
            return str(store.uploads.append(upload, WEIGHTS_FILE, 0, b"x" * 30000))
        except Exception as error:
            return getattr(error, "reason", repr(error))

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(append, range(4))) == ["30000", *["UPLOAD_OFFSET"] * 3]
    assert (root / "uploads" / upload / WEIGHTS_FILE).read_bytes() == b"x" * 30000


def test_what_is_not_the_expected_adapter_is_refused_and_can_be_put_right(
    store: Store, root: Path, source: Path, digest: str
) -> None:
    upload = store.uploads.begin()
    store.uploads.append(upload, CONFIG_FILE, 0, (source / CONFIG_FILE).read_bytes())
    missing = refusal(store.finish_upload, upload, "a", digest, BASE)
    assert missing == ("ADAPTER_INVALID", WEIGHTS_FILE)
    send(store, upload, source)
    other = "sha256:" + "0" * 64
    assert refusal(store.finish_upload, upload, "a", other, BASE) == ("ADAPTER_INVALID", "digest")
    assert refusal(store.finish_upload, upload, "a", "?", BASE) == ("FIELD_INVALID", "digest")
    assert refusal(store.finish_upload, upload, "A", digest, BASE) == ("FIELD_INVALID", "name")
    too_large = refusal(store.finish_upload, upload, "a", digest, BASE, AdapterLimits(max_rank=2))
    assert too_large[0] == "RANK_TOO_LARGE"
    assert not blobs(root)
    assert not rubbish(root)
    assert store.finish_upload(upload, "a", digest, BASE)[1]


@pytest.mark.parametrize(
    "upload",
    ["", "..", "../staging", UNKNOWN, "0" * 31, "0" * 33, UNKNOWN + "\n", "A" * 32, "lock"],
)
def test_only_open_uploads_are_found(upload: str, store: Store, digest: str) -> None:
    not_found = ("UPLOAD_NOT_FOUND", upload)
    assert refusal(store.uploads.state, upload) == not_found
    assert refusal(store.uploads.append, upload, CONFIG_FILE, 0, b"") == not_found
    assert refusal(store.uploads.abort, upload) == not_found
    assert refusal(store.finish_upload, upload, "a", digest, BASE) == not_found


@pytest.mark.parametrize("file", ["", "lock", "../lock", "adapter_model.bin", "/etc/passwd"])
def test_only_the_two_files_are_taken(file: str, store: Store) -> None:
    upload = store.uploads.begin()
    assert refusal(store.uploads.append, upload, file, 0, b"x") == ("FIELD_INVALID", "file")


def test_uploads_are_bounded_in_size_and_number(store: Store) -> None:
    first, *_ = [store.uploads.begin() for _ in range(BOUNDS.max_open)]
    assert refusal(store.uploads.begin)[0] == "OVERLOADED"
    large = b"x" * (BOUNDS.max_weights_bytes + 1)
    assert refusal(store.uploads.append, first, WEIGHTS_FILE, 0, large)[0] == "ADAPTER_TOO_LARGE"
    assert store.uploads.append(first, WEIGHTS_FILE, 0, large[:-1]) == BOUNDS.max_weights_bytes
    assert (
        refusal(store.uploads.append, first, WEIGHTS_FILE, BOUNDS.max_weights_bytes, b"x")[0]
        == "ADAPTER_TOO_LARGE"
    )
    config = b"x" * (MAX_CONFIG_BYTES + 1)
    assert refusal(store.uploads.append, first, CONFIG_FILE, 0, config)[0] == "ADAPTER_TOO_LARGE"
    store.uploads.abort(first)
    store.uploads.begin()


def test_an_upload_that_nobody_goes_on_with_expires(root: Path, store: Store) -> None:
    kept, *stale = [store.uploads.begin() for _ in range(3)]
    for upload in stale:
        store.uploads.append(upload, CONFIG_FILE, 0, b"{}")
        age(root, upload)
    assert store.uploads.append(stale[0], CONFIG_FILE, 2, b" ") == 3
    assert store.gc(0, dry_run=True).uploads == (stale[1],)
    assert store.uploads.state(stale[1]).config_bytes == 2
    age(root, stale[1])
    assert store.gc(0).uploads == (stale[1],)
    assert refusal(store.uploads.state, stale[1]) == ("UPLOAD_NOT_FOUND", stale[1])
    age(root, stale[0])
    with Store(root):
        assert refusal(store.uploads.state, stale[0]) == ("UPLOAD_NOT_FOUND", stale[0])
    assert store.uploads.state(kept) == Upload(kept, 0, 0)
    assert not rubbish(root)


def test_an_upload_in_use_does_not_expire(
    root: Path, store: Store, source: Path, digest: str
) -> None:
    upload = store.uploads.begin()
    send(store, upload, source)
    age(root, upload)
    with store.uploads.reading(upload):
        assert store.gc(0).uploads == ()
    assert store.finish_upload(upload, "a", digest, BASE)[1]


def test_a_link_in_place_of_a_file_is_not_followed(
    root: Path, store: Store, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"r": 8}))
    upload = store.uploads.begin()
    (root / "uploads" / upload / CONFIG_FILE).symlink_to(secret)
    refused = refusal(store.uploads.append, upload, CONFIG_FILE, secret.stat().st_size, b"x")
    assert refused[0] == "STORE_UNAVAILABLE"
    assert secret.read_text() == '{"r": 8}'


@pytest.mark.fault("uploads-blocked")
def test_uploads_without_bytes_expire_in_minutes_and_the_others_stay(
    root: Path, store: Store
) -> None:
    bounds = UploadBounds()
    assert bounds.expire_empty_seconds <= 600 < bounds.expire_seconds
    with Store(root, uploads=UploadBounds(max_open=4)) as store:
        empty, begun, fresh = (store.uploads.begin() for _ in range(3))
        store.uploads.append(begun, CONFIG_FILE, 0, b"{}")
        for upload in (empty, begun):
            then = time.time() - bounds.expire_empty_seconds - 5
            folder = root / "uploads" / upload
            store.uploads.state(upload)  # looking at an upload does not keep it
            for file in (*folder.iterdir(), folder):
                os.utime(file, (then, then))
        assert [upload.id for upload in store.uploads.all()] == [empty, fresh, begun]
        assert store.gc(0, dry_run=True).uploads == (empty,)
        for _ in range(2):
            store.uploads.begin()
        assert refusal(store.uploads.state, empty) == ("UPLOAD_NOT_FOUND", empty)
        assert store.uploads.state(begun).config_bytes == 2


@pytest.mark.fault("uploads-blocked")
def test_one_peer_cannot_take_all_uploads(root: Path) -> None:
    assert UploadBounds().max_per_peer <= UploadBounds().max_open / 2
    bounds = UploadBounds(max_open=5, max_per_peer=2)
    with Store(root, uploads=bounds) as store:
        first, _ = (store.uploads.begin("10.0.0.1") for _ in range(2))
        assert refusal(store.uploads.begin, "10.0.0.1")[0] == "OVERLOADED"
        other = store.uploads.begin("10.0.0.2")
    with Store(root, uploads=bounds) as store:  # the addresses survive a restart
        assert refusal(store.uploads.begin, "10.0.0.1")[0] == "OVERLOADED"
        assert {u.id: u.peer for u in store.uploads.all()}[other] == "10.0.0.2"
        store.uploads.abort(first)
        store.uploads.begin("10.0.0.1")
        store.uploads.begin()
        store.uploads.begin()
        assert refusal(store.uploads.begin, "10.0.0.3")[0] == "OVERLOADED"


@pytest.mark.fault("uploads-blocked")
def test_an_upload_that_is_registered_for_long_holds_up_nobody_who_asks_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_adapters.store.files.uploads._BUSY_SECONDS", 0.05)
    upload = store.uploads.begin()
    store.uploads.append(upload, CONFIG_FILE, 0, b"{}")
    with store.uploads.reading(upload), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(refusal, store.uploads.state, upload)
        assert asked.result(20)[0] == "OVERLOADED"
        assert [each.config_bytes for each in store.uploads.all()] == [2]
    assert store.uploads.state(upload).config_bytes == 2


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"adapter_config.json": "x"}', b"\xff"])
def test_with_a_damaged_record_an_upload_begins_again(
    record: bytes, root: Path, store: Store
) -> None:
    upload = store.uploads.begin()
    store.uploads.append(upload, CONFIG_FILE, 0, b"{")
    (root / "uploads" / upload / "received.json").write_bytes(record)
    assert store.uploads.state(upload).config_bytes == 0
    assert store.uploads.append(upload, CONFIG_FILE, 0, b"{}") == 2
