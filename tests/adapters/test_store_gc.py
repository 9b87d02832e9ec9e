"""A collection removes exactly what nothing names, also during concurrent registrations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from adapters.stores import DATABASES, blobs, refusal, rubbish
from loraplex_adapters.store import Collected, Store
from loraplex_model.base import faults
from loraplex_model.base.refusal import Refusal

from adapters import stores

NOTHING = Collected((), (), (), 0, ())


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> str:
    return stores.url(request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path, url: str) -> Any:
    with Store(root, url) as opened:
        yield opened


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return stores.adapters(tmp_path_factory.mktemp("sources"), 3)


def test_what_was_deleted_long_enough_goes_with_its_bytes(
    store: Store, root: Path, sources: list[Path]
) -> None:
    shared, _ = store.register("a", sources[0], BASE, labels={"team": "ops"})
    alone, _ = store.register("a", sources[1], BASE, replace=True)
    store.register("b", sources[0], BASE)
    store.set_alias("prod", "a")
    store.delete("a")
    assert store.gc() == NOTHING, "it can still be restored"
    size = sum(file.stat().st_size for file in store.path(alone.digest).iterdir())
    expected = Collected(("a@1", "a@2"), ("prod",), (alone.digest,), size, ())
    assert store.gc(0, dry_run=True) == expected
    assert blobs(root) == {shared.digest, alone.digest}
    assert store.gc(0) == expected
    assert blobs(root) == {shared.digest}
    assert store.resolve("b").digest == shared.digest
    assert refusal(store.restore, "a") == ("ADAPTER_NOT_FOUND", "a")
    assert store.aliases() == ()
    assert store.register("a", sources[1], BASE)[0].version == 3
    assert store.gc(0) == NOTHING
    assert not rubbish(root)


def test_bytes_in_use_are_kept_until_they_are_not(
    store: Store, root: Path, sources: list[Path]
) -> None:
    digest = store.register("a", sources[0], BASE)[0].digest
    store.delete("a")
    assert store.gc(0, keep={digest}).digests == ()
    store.verify(digest)
    assert store.gc(0).digests == (digest,)
    assert not blobs(root)


def test_bytes_that_were_never_named_go_after_the_grace(
    store: Store, root: Path, sources: list[Path]
) -> None:
    def die(point: str) -> None:
        if point == "store.publish.done":
            raise RuntimeError

    with pytest.raises(RuntimeError), faults.injected(die):
        store.register("a", sources[0], BASE)
    (orphan,) = blobs(root)
    assert store.gc(3600) == NOTHING
    assert store.gc(0).digests == (orphan,)
    assert not blobs(root)


def test_what_does_not_belong_to_the_store_is_left_alone(
    store: Store, root: Path, sources: list[Path]
) -> None:
    strangers = [
        root / "blobs" / "sha256" / "notes.txt",
        root / "trash" / "notes.txt",
        root / "uploads" / "notes.txt",
        root / "notes.txt",
    ]
    for stranger in strangers:
        stranger.write_text("mine")
    assert store.gc(0) == NOTHING
    assert all(stranger.read_text() == "mine" for stranger in strangers)


def test_a_registration_whose_bytes_are_collected_meanwhile_stores_them_again(
    store: Store, root: Path, sources: list[Path]
) -> None:
    digest = store.register("old", sources[0], BASE)[0].digest
    store.delete("old")
    collected: list[tuple[str, ...]] = []
    real = store._index.point

    def point_after_a_collection(*args: Any) -> Any:
        # The bytes have been found stored, and are about to be pointed to.
        if not collected:
            collected.append(store.gc(0).digests)
        return real(*args)

    store._index.point = point_after_a_collection  # type: ignore[method-assign]
    record, created = store.register("new", sources[0], BASE)
    assert collected == [(digest,)]
    assert created
    assert record.digest == digest
    store.verify(digest)
    assert not rubbish(root)


@pytest.mark.fault("registration-starves")
@pytest.mark.parametrize("known", [False, True])
def test_a_registration_ends_however_often_its_bytes_are_collected(
    store: Store, root: Path, url: str, sources: list[Path], known: bool
) -> None:
    if known:  # bytes that are in the store already, and that nothing names
        store.register("old", sources[0], BASE)
        store.delete("old")
    real = store._index.point
    with Store(root, url) as collector:

        def point_after_a_collection(*args: Any) -> Any:
            collector.gc(0)
            return real(*args)

        store._index.point = point_after_a_collection  # type: ignore[method-assign]
        record, created = store.register("new", sources[0], BASE)
        collector.gc(0)
        assert created
        assert collector.resolve("new") == record
        collector.verify(record.digest)
    assert not rubbish(root)


@pytest.mark.fault("registration-starves")
def test_a_registration_that_dies_leaves_nothing_that_is_kept_for_ever(
    root: Path, url: str, sources: list[Path]
) -> None:
    def die(point: str) -> None:
        if point == "store.publish.done":
            os._exit(0)

    Store(root, url).close()
    child = os.fork()
    if not child:
        with faults.injected(die), Store(root, url) as dying:
            dying.register("a", sources[0], BASE)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with Store(root, url) as store:
        assert len(store.gc(0).digests) == 1
        assert not blobs(root)
        assert not rubbish(root)


@pytest.mark.fault("registration-displaces")
@pytest.mark.parametrize("before", ["absent", "damaged", "a file"])
def test_bytes_that_another_registration_has_just_placed_stay_where_they_are(
    store: Store, root: Path, url: str, sources: list[Path], before: str
) -> None:
    with Store(root, url) as other:
        if before != "absent":
            place = store.path(store.register("old", sources[0], BASE)[0].digest)
            weights = place / "adapter_model.safetensors"
            if before == "damaged":
                weights.chmod(0o644)
                weights.write_bytes(b"x")
            else:
                shutil.rmtree(place)
                place.touch()
        reached: list[str] = []
        real = store._index.point

        def point_after_another(*args: Any) -> Any:
            other.register("other", sources[0], BASE)
            reached.clear()
            return real(*args)

        store._index.point = point_after_another  # type: ignore[method-assign]
        with faults.injected(reached.append):
            record, _ = store.register("new", sources[0], BASE)
    assert "store.publish.displace" not in reached
    assert "store.index.commit" in reached
    assert record.digest == store.get("other").digest
    store.verify(record.digest)
    assert not rubbish(root)


def test_bytes_in_the_trash_that_something_names_are_taken_back(
    root: Path, url: str, sources: list[Path]
) -> None:
    with Store(root, url) as store:
        digest = store.register("a", sources[0], BASE)[0].digest
        # As if a collector had lost its connection after the rename, and a registration had come.
        for again in ("open", "collect"):
            assert store._blobs.discard(digest) is not None
            assert refusal(store.verify, digest)[0] == "ADAPTER_NOT_FOUND"
            if again == "open":
                Store(root, url).close()
            else:
                assert store.gc(0) == NOTHING
            store.verify(digest)
            assert not rubbish(root)


RACER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from adapters.adapter_files import BASE
from loraplex_model.base.refusal import Refusal
from loraplex_adapters.store import Store

top, url, role = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
done = 0
with Store(top / "store", url) as store:
    sys.stdin.readline()
    if role == "collect":
        while not (top / "stop").exists():
            done += len(store.gc(0).digests)
    else:
        for n in range(40):
            name = f"{role}-{n % 3}"
            record, _ = store.register(name, top / f"source-{n % 2}", BASE, replace=True)
            store.verify(record.digest)
            if n % 2:
                store.delete(name)
            done += 1
print(json.dumps(done))
"""


@pytest.mark.fault("registration-starves")
def test_processes_that_register_delete_and_collect_at_once_lose_nothing(
    tmp_path: Path, url: str
) -> None:
    stores.adapters(tmp_path, 2)
    tests = str(Path(__file__).parents[1])
    processes = {
        role: subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), url, role, tests],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for role in ("left", "right", "collect")
    }
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = {}
    for role, process in processes.items():
        if role == "collect":
            (tmp_path / "stop").touch()
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        outcomes[role] = json.loads(out)
    assert outcomes["left"] == outcomes["right"] == 40
    assert outcomes["collect"] > 0, "it never collected what they wanted"
    with Store(tmp_path / "store", url) as store:
        assert all(verified.error is None for verified in store.verify_all())
        store.gc(0)
        assert blobs(tmp_path / "store") == {v.digest for v in store.verify_all()}
        assert not rubbish(tmp_path / "store")


def test_verify_all_names_what_is_damaged_and_who_needs_it(
    store: Store, sources: list[Path]
) -> None:
    damaged = store.register("a", sources[0], BASE)[0].digest
    store.register("b", sources[0], BASE)
    sound = store.register("c", sources[1], BASE)[0].digest
    store.delete("a")
    weights = store.path(damaged) / "adapter_model.safetensors"
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    found = {v.digest: v for v in store.verify_all()}
    assert found[sound].error is None
    assert found[damaged].versions == ("a@1", "b@1")
    error = found[damaged].error
    assert isinstance(error, Refusal)
    assert error.reason == "ADAPTER_CORRUPT"
