"""The store: names point to versions, versions to bytes, and nothing acknowledged is ever lost."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from adapters.adapter_files import (
    BASE,
    base_info,
    everywhere,
    lora_config,
    lora_tensors,
    write_adapter,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.files import open_directory
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Record, Store
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Refusal


def adapter(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a valid adapter; its content depends on the seed."""
    tensors = lora_tensors(everywhere("q_proj", "v_proj"), seed=seed)
    return write_adapter(directory, lora_config(**changes), tensors)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [adapter(tmp_path / f"source-{seed}", seed) for seed in range(3)]


def refusal(call: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(Refusal) as refused:
        call(*args, **kwargs)
    return refused.value.reason, refused.value.field


def test_a_registered_adapter_is_found_by_name_version_and_digest(
    store: Store, sources: list[Path]
) -> None:
    before = datetime.now(UTC)
    record, created = store.register("pirate", sources[0], BASE)
    spec = inspect(sources[0], BASE)
    assert created
    assert record == Record(
        name="pirate",
        version=1,
        digest=spec.digest,
        peft_type="LORA",
        rank=4,
        target_modules=("q_proj", "v_proj"),
        size_bytes=(sources[0] / "adapter_model.safetensors").stat().st_size,
        base_model="tiny",
        created_at=record.created_at,
        base_fingerprint=BASE.fingerprint,
        provenance=spec.provenance,
    )
    assert timedelta(0) <= record.created_at - before < timedelta(minutes=5)
    for adapter_id in ("pirate", "pirate@1", f"pirate@{spec.digest}"):
        assert store.resolve(adapter_id) == record
    assert store.get("pirate") == store.get("pirate", 1) == record
    assert inspect(store.path(spec.digest), BASE) == spec


def test_a_blob_is_a_read_only_copy_of_the_two_files_alone(
    store: Store, sources: list[Path]
) -> None:
    (sources[0] / "optimizer.pt").write_bytes(b"state")
    (sources[0] / "tokenizer_config.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in sources[0].glob("adapter_*")}
    blob = store.path(store.register("a", sources[0], BASE)[0].digest)
    (sources[0] / "adapter_config.json").write_text("changed afterwards")
    assert {p.name: p.read_bytes() for p in blob.iterdir()} == before
    assert not any(p.stat().st_mode & 0o222 for p in blob.iterdir())


def test_a_hard_link_is_copied_so_its_other_name_changes_nothing(
    store: Store, sources: list[Path], tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in sources[0].iterdir():
        os.link(file, twin / file.name)
    digest = store.register("a", twin, BASE)[0].digest
    with (sources[0] / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\xc0\x7f")
    store.verify(digest)


def test_registering_the_same_bytes_again_returns_the_version_there_is(
    store: Store, sources: list[Path]
) -> None:
    first, _ = store.register("a", sources[0], BASE)
    for replace in (False, True):
        assert store.register("a", sources[0], BASE, replace=replace) == (first, False)
    other, created = store.register("b", sources[0], BASE)
    assert created
    assert (other.digest, other.version) == (first.digest, 1)


def test_a_name_moves_to_other_bytes_only_when_asked(store: Store, sources: list[Path]) -> None:
    first, _ = store.register("a", sources[0], BASE)
    assert refusal(store.register, "a", sources[1], BASE) == ("ADAPTER_CONFLICT", "a")
    assert store.resolve("a") == first
    second, created = store.register("a", sources[1], BASE, replace=True)
    assert created
    assert (second.version, store.resolve("a"), store.resolve("a@1")) == (2, second, first)
    third, created = store.register("a", sources[0], BASE, replace=True)
    assert created
    assert (third.version, third.digest) == (3, first.digest)
    assert store.resolve(f"a@{first.digest}") == third


def test_a_deleted_name_is_gone_and_its_versions_never_come_back(
    store: Store, sources: list[Path]
) -> None:
    store.register("a", sources[0], BASE)
    old, _ = store.register("a", sources[1], BASE, replace=True)
    store.register("b", sources[1], BASE)
    store.delete("a")
    for gone in ("a", "a@1", "a@2", f"a@{old.digest}"):
        assert refusal(store.resolve, gone) == ("ADAPTER_NOT_FOUND", gone)
    assert refusal(store.delete, "a") == ("ADAPTER_NOT_FOUND", "a")
    assert [r.name for r in store.page().records] == ["b"]
    store.verify(old.digest)
    again, created = store.register("a", sources[1], BASE)
    assert created
    assert again.version == 3
    assert refusal(store.resolve, "a@2")[0] == "ADAPTER_NOT_FOUND"


def test_everything_is_there_again_after_reopening(tmp_path: Path, sources: list[Path]) -> None:
    with Store(tmp_path / "s") as store:
        store.register("a", sources[0], BASE)
        records = store.register("a", sources[1], BASE, replace=True)[0], store.resolve("a@1")
    with Store(tmp_path / "s") as store:
        assert (store.resolve("a"), store.resolve("a@1")) == records
        store.verify(records[0].digest)


def test_a_listing_is_in_the_order_of_names_page_by_page(store: Store, sources: list[Path]) -> None:
    names = ["b", "a-1", "a", "z9", "0", "a0"]
    for name in names:
        store.register(name, sources[0], BASE)
    store.register("b", sources[1], BASE, replace=True)
    seen: list[str] = []
    token = ""
    for _ in range(4):
        page = store.page(2, token)
        seen += [f"{r.name}@{r.version}" for r in page.records]
        token = page.next_page_token
        if not token:
            break
    assert seen == [f"{n}@{2 if n == 'b' else 1}" for n in sorted(names)]
    assert store.page(6).next_page_token == ""
    assert len(store.page(0).records) == len(store.page(5000).records) == 6
    store.delete("a0")
    assert [r.name for r in store.page(9, "a0").records] == ["b", "z9"]
    assert refusal(store.page, -1) == ("FIELD_INVALID", "page_size")
    assert refusal(store.page, 5, "A; DROP TABLE names") == ("FIELD_INVALID", "page_token")


BAD_NAMES = [
    "",
    "-a",
    "a-",
    "A",
    "a_b",
    "a.b",
    "a/b",
    "..",
    "a" * 64,
    "a\n",
    "a\0",
    "\u0430",
    "%2e",
    "\uff0e\uff0e",
    "a b",
    "con ",
    "\u0661",
]
BAD_IDS = [
    *BAD_NAMES,
    "a@",
    "a@0",
    "a@01",
    "a@-1",
    "a@1@2",
    "a@v1",
    "a@\u0661",
    "a@1\n",
    "a@" + "9" * 30,
    "@1",
    "a@sha256:",
    "a@sha256:" + "0" * 63,
    "a@sha256:" + "G" * 64,
    "a@sha256:" + "A" * 64,
    "a@sha256:../" + "0" * 61,
    "a@md5:" + "0" * 64,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_only_names_of_the_grammar_are_taken(name: str, store: Store, sources: list[Path]) -> None:
    assert refusal(store.register, name, sources[0], BASE) == ("FIELD_INVALID", "name")
    assert refusal(store.delete, name) == ("FIELD_INVALID", "name")
    assert refusal(store.get, name) == ("FIELD_INVALID", "name")


@pytest.mark.parametrize("adapter_id", BAD_IDS)
def test_only_ids_of_the_grammar_are_looked_up(adapter_id: str, store: Store) -> None:
    assert refusal(store.resolve, adapter_id) == ("FIELD_INVALID", "adapter_id")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    top = tmp_path_factory.mktemp("shared")
    with Store(top / "store") as opened:
        opened.register("a", adapter(top / "source"), BASE)
        yield opened


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=70) | st.text("ab-@0:/.\0\n", max_size=10))
def test_no_id_gives_anything_but_an_adapter_or_a_typed_error(
    shared: Store, adapter_id: str
) -> None:
    try:
        assert shared.resolve(adapter_id).name == "a"
    except Refusal as error:
        assert error.reason in ("FIELD_INVALID", "ADAPTER_NOT_FOUND")  # noqa: PT017
    try:
        shared.path(adapter_id)
    except Refusal as error:
        assert error.reason == "FIELD_INVALID"  # noqa: PT017


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:..", "../../etc", "0" * 64, "sha256:" + "0" * 63 + "/"]
)
def test_only_digests_become_paths(digest: str, store: Store) -> None:
    assert refusal(store.path, digest) == ("FIELD_INVALID", "digest")
    unknown = "sha256:" + "0" * 64
    assert refusal(store.path, unknown) == ("ADAPTER_NOT_FOUND", unknown)


def leftovers(root: Path) -> list[Path]:
    """Files in the staging areas, except locks."""
    return [p for p in (root / "staging").glob("*/*") if p.name != "owner"]


@pytest.mark.parametrize(
    ("config", "base", "limits", "reason"),
    [
        ({"layer_replication": [[0, 2]]}, BASE, None, "ADAPTER_UNSUPPORTED"),
        (
            {},
            base_info(hidden_size=64),
            None,
            "BASE_MODEL_MISMATCH",
        ),
        ({}, BASE, AdapterLimits(max_rank=2), "RANK_TOO_LARGE"),
        ({}, BASE, AdapterLimits(max_abs_value=0.1), "ADAPTER_INVALID"),
    ],
)
def test_a_refused_adapter_leaves_nothing_behind(
    config: Any,
    base: BaseInfo,
    limits: AdapterLimits | None,
    reason: str,
    store: Store,
    tmp_path: Path,
) -> None:
    source = adapter(tmp_path / "a", **config)
    assert refusal(store.register, "a", source, base, limits)[0] == reason
    assert refusal(store.resolve, "a")[0] == "ADAPTER_NOT_FOUND"
    assert not list((tmp_path / "store" / "blobs" / "sha256").iterdir())
    assert not leftovers(tmp_path / "store")


def test_what_is_registered_is_what_was_checked_even_if_the_source_changes_meanwhile(
    store: Store, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_adapters.store import store as module

    look = module.examine_header

    def look_then_swap(*args: Any) -> Any:
        seen = look(*args)
        with (sources[0] / "adapter_model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\xc0\x7f")  # NaN
        return seen

    monkeypatch.setattr(module, "examine_header", look_then_swap)
    assert refusal(store.register, "a", sources[0], BASE)[0] == "ADAPTER_INVALID"
    assert refusal(store.resolve, "a")[0] == "ADAPTER_NOT_FOUND"


def test_an_open_directory_can_be_registered(store: Store, sources: list[Path]) -> None:
    with open_directory(sources[0]) as source:
        sources[0].rename(sources[0].with_name("moved"))
        assert store.register("a", source, BASE)[1]


def damage(blob: Path) -> None:
    file = blob / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        damage,
        lambda blob: (blob / "adapter_model.safetensors").unlink(),
        lambda blob: (blob / "adapter_config.json").unlink(),
    ],
)
def test_a_damaged_blob_is_noticed_and_registering_again_mends_it(
    harm: Any, store: Store, sources: list[Path]
) -> None:
    digest = store.register("a", sources[0], BASE)[0].digest
    harm(store.path(digest))
    assert refusal(store.verify, digest) == ("ADAPTER_CORRUPT", digest)
    store.register("a", sources[0], BASE)
    store.verify(digest)
    shutil.rmtree(store.path(digest))
    assert refusal(store.path, digest)[0] == "ADAPTER_NOT_FOUND"
    store.register("a", sources[0], BASE)
    store.verify(digest)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "STORE_FULL"),
        (errno.EDQUOT, "STORE_FULL"),
        (errno.EIO, "STORE_UNAVAILABLE"),
        (errno.EROFS, "STORE_UNAVAILABLE"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "open", "mkdir", "rename"])
def test_a_failing_disk_is_a_typed_error_and_loses_nothing(
    call: str, code: int, reason: str, store: Store, sources: list[Path], tmp_path: Path
) -> None:
    kept, _ = store.register("kept", sources[0], BASE)
    real = getattr(os, call)

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        # Only what is written, and only in the store: reading the source goes on.
        inside = call == "fsync" or (
            isinstance(path, Path) and path.is_relative_to(tmp_path / "store")
        )
        if inside:
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, failing)
        assert refusal(store.register, "new", sources[1], BASE)[0] == reason
    assert store.page().records == (kept,)
    assert store.register("new", sources[1], BASE)[1]
    store.close()
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_an_index_without_room_is_a_typed_error(tmp_path: Path, sources: list[Path]) -> None:
    def cap(connection: sqlite3.Connection, _entry: object) -> None:
        connection.execute("PRAGMA max_page_count = 9")

    with Store(tmp_path / "s"):
        pass
    sa.event.listen(sa.Engine, "connect", cap)
    try:
        with Store(tmp_path / "s") as store:
            reasons = set()
            for n in range(400):
                try:
                    store.register(f"a{n}", sources[0], BASE)
                except Refusal as error:
                    reasons.add(error.reason)
                    break
        assert reasons == {"STORE_FULL"}
    finally:
        sa.event.remove(sa.Engine, "connect", cap)


def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    assert refusal(Store, tmp_path / "file")[0] == "STORE_UNAVAILABLE"
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "index.sqlite3").write_bytes(b"no database at all" * 100)
    assert refusal(Store, tmp_path / "s")[0] == "STORE_UNAVAILABLE"
    with Store(tmp_path / "newer"):
        pass
    with sqlite3.connect(tmp_path / "newer" / "index.sqlite3") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    assert refusal(Store, tmp_path / "newer")[0] == "STORE_UNAVAILABLE"


def test_a_second_store_leaves_a_living_staging_area_alone(
    store: Store, sources: list[Path], tmp_path: Path
) -> None:
    root = tmp_path / "store"
    dead = root / "staging" / "dead" / "half-a-copy"
    dead.mkdir(parents=True)
    (dead / "adapter_config.json").write_text("{")
    living = next(p for p in (root / "staging").iterdir() if p.name != "dead")
    with Store(root) as second:
        assert living.exists()
        assert not dead.exists()
        assert store.register("a", sources[0], BASE)[1]
        assert second.resolve("a") == store.resolve("a")
    store.close()
    store.close()
    assert not list((root / "staging").iterdir())


def test_threads_may_share_a_store(store: Store, sources: list[Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as pool:
        results = list(
            pool.map(lambda n: store.register("a", sources[n % 3], BASE, replace=True), range(30))
        )
    made = sorted(record.version for record, created in results if created)
    assert made == list(range(1, len(made) + 1))
    assert store.get("a").version == made[-1]
    for version in made:
        store.verify(store.get("a", version).digest)
