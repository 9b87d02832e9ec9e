"""The store after a loss of power: what was acknowledged is there, and nothing half-written is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters.adapter_files import BASE
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.store import Store
from loraplex_model.base import faults
from loraplex_model.base.refusal import Refusal
from power.recorder import Recorder
from power.replay import replay

from adapters import store_workload as workload
from adapters import stores

power_cut = pytest.mark.fault("power-cut")
FILES = (CONFIG_FILE, WEIGHTS_FILE)
PIECE = 3000


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program runs after it."""


def killed_at(point: str) -> Callable[[str], None]:
    def kill(reached: str) -> None:
        if reached == point:
            raise Killed(point)

    return kill


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("prepared")
    workload.prepare(top)
    return top


@power_cut
@pytest.mark.parametrize("at_most", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_whatever_power_leaves_of_a_store_it_has_what_it_acknowledged(
    at_most: int, prepared: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(prepared / "template", root)
    recorder = Recorder(root)
    with recorder.recording():
        workload.live(root, prepared, recorder.acknowledge)
    replay(
        recorder.moments,
        lambda left, acknowledged: workload.check(left, prepared, set(acknowledged)),
        at_most=at_most,
    )


def send(store: Store, upload: str, source: Path, acknowledge: Callable[[str], None]) -> None:
    """Sends what an upload lacks, in pieces; acknowledges each by the file's name and size."""
    state = store.uploads.state(upload)
    for file, size in zip(FILES, (state.config_bytes, state.weights_bytes), strict=True):
        data = (source / file).read_bytes()
        for start in range(size, len(data), PIECE):
            store.uploads.append(upload, file, start, data[start : start + PIECE])
            acknowledge(f"{file} {min(start + PIECE, len(data))}")


def check_upload(root: Path, source: Path, acknowledged: frozenset[str]) -> None:
    """Continues the upload, if there is one, as a client without the digest does."""
    received = dict.fromkeys(FILES, 0)
    for step in acknowledged - {"begun", "finished"}:
        file, size = step.split()
        received[file] = max(received[file], int(size))
    with Store(root) as store:
        if "finished" not in acknowledged:
            names = [f.name for f in (root / "uploads").iterdir() if len(f.name) == 32]
            assert names or "begun" not in acknowledged or stores.blobs(root)
            for upload in names:
                state = store.uploads.state(upload)
                assert state.config_bytes >= received[CONFIG_FILE]
                assert state.weights_bytes >= received[WEIGHTS_FILE]
                send(store, upload, source, lambda step: None)
                store.finish_upload(upload, "sent", "", BASE)
        for record in store.current():
            assert record.id == "sent@1"
            for file in FILES:
                stored = (store.path(record.digest) / file).read_bytes()
                assert stored == (source / file).read_bytes()
        assert "finished" not in acknowledged or store.resolve("sent").version == 1


@power_cut
@pytest.mark.parametrize(
    "killed",
    [
        "",
        "store.upload.write",
        "store.upload.sync",
        "store.received.write",
        "store.received.sync-directory",
    ],
)
def test_an_upload_goes_on_with_the_bytes_that_were_sent(killed: str, tmp_path: Path) -> None:
    source = stores.adapter(tmp_path / "source")
    (tmp_path / "disk").mkdir()
    recorder = Recorder(tmp_path / "disk")
    root = tmp_path / "disk" / "store"
    with recorder.recording():
        first = Store(root)
        upload = first.uploads.begin()
        recorder.acknowledge("begun")
        if killed:
            data = (source / WEIGHTS_FILE).read_bytes()
            with faults.injected(killed_at(killed)), pytest.raises(Killed):
                first.uploads.append(upload, WEIGHTS_FILE, 0, data[:PIECE])
        with Store(root) as store:
            send(store, upload, source, recorder.acknowledge)
            store.finish_upload(upload, "sent", "", BASE)
            recorder.acknowledge("finished")
        first.close()
    replay(
        recorder.moments,
        lambda left, acknowledged: check_upload(left / "store", source, acknowledged),
        at_most=50,
    )


@power_cut
@pytest.mark.parametrize("killed", ["store.publish.sync", "store.publish.done"])
def test_a_registration_after_a_killed_one_is_safe(killed: str, tmp_path: Path) -> None:
    """The killed process has renamed the blob but not flushed the rename."""
    source, other = stores.adapters(tmp_path, 2)
    root = tmp_path / "disk"
    with Store(root) as store:
        store.register("other", other, BASE)
    recorder = Recorder(root)
    with recorder.recording():
        first = Store(root)
        with faults.injected(killed_at(killed)), pytest.raises(Killed):
            first.register("a", source, BASE)
        with Store(root) as store:
            store.register("a", source, BASE)
            recorder.acknowledge("registered")
            store.delete("other")
            recorder.acknowledge("deleted")
            store.gc(0)
            recorder.acknowledge("collected")
            store.register("other", other, BASE)
            recorder.acknowledge("again")
        first.close()
    replay(recorder.moments, lambda left, done: check_registered(left, source, done), at_most=60)


def check_registered(root: Path, source: Path, acknowledged: frozenset[str]) -> None:
    with Store(root) as store:
        assert all(verified.error is None for verified in store.verify_all())
        found = {record.name: record.version for record in store.current()}
        assert found.get("a", 0) == 1 or "registered" not in acknowledged
        assert found.get("other", 1) == 1 or "collected" in acknowledged
        assert "deleted" not in acknowledged or found.get("other") != 1
        assert "again" not in acknowledged or found["other"] == 2
        assert store.register("a", source, BASE)[0].version == 1
        store.gc(0)
        assert not stores.rubbish(root)


def test_sqlite_is_asked_to_flush_every_commit(tmp_path: Path) -> None:
    """In WAL mode a lower level loses commits that were acknowledged."""
    with Store(tmp_path / "store") as store:
        for transaction in (store._database.reading, store._database.writing):
            with transaction() as connection:
                (level,) = connection.exec_driver_sql("PRAGMA synchronous").one()
                assert level >= 2  # FULL or EXTRA


def test_a_store_whose_folder_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Refusal, match="cannot be written"):
        Store(tmp_path / "file" / "store")
