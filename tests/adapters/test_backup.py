"""A backup holds all of a store, whatever happens meanwhile, and only what is whole comes back."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loraplex_adapters.store.backup
import pytest
from adapters.adapter_files import BASE
from adapters.stores import refusal
from loraplex_adapters.format.files import WEIGHTS_FILE
from loraplex_adapters.store import Store, VersionText
from loraplex_adapters.store.backup import back_up, check_backup, recover, rows
from loraplex_adapters.store.index.database import Database
from loraplex_model.base import faults
from loraplex_model.base.refusal import Reason, Refusal

from adapters import stores


def points() -> list[str]:
    """Every fault point in the source of backups, but for those of attached folders, which
    test_backup_attached.py reaches."""
    found = []
    for file in sorted(Path(loraplex_adapters.store.backup.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("reach"):
                found.append(ast.literal_eval(node.args[0]))
    return [point for point in found if ".attached." not in point]


WRITING = sorted(point for point in set(points()) if ".recover." not in point)
RECOVERING = [*sorted(set(points()) - set(WRITING)), "backup.copy.write", "backup.copy.sync"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return stores.adapters(tmp_path_factory.mktemp("sources"), 5)


def fill(root: Path, sources: list[Path], url: str = "") -> None:
    """A store with something in every table."""
    with Store(root, url) as store:
        store.register("a", sources[0], BASE, labels={"team": "öps"})
        store.register("a", sources[1], BASE, replace=True)
        store.set_alias("prod", "a@1")
        text = VersionText("{{ messages }}", (1, 2))
        store.register("b", sources[2], BASE, text=text)
        store.register("gone", sources[3], BASE)
        store.delete("gone")
        store.register("held", sources[0], BASE)
        store.quarantine(store.resolve("b").digest, "it ended the engine")
        store.quarantine("sha256:" + "0" * 64, "content that is not there")
        store.rebase("a@1", BASE.named("another"))


def everything(root: Path, url: str = "") -> list[bytes]:
    """The lines of a store's index."""
    database = Database(root / "index.sqlite3", url)
    try:
        with database.reading() as connection:
            return list(rows.dump(connection))
    finally:
        database.close()


@pytest.fixture
def root(tmp_path: Path, sources: list[Path]) -> Path:
    fill(tmp_path / "store", sources)
    return tmp_path / "store"


@pytest.mark.parametrize("after", stores.DATABASES)
@pytest.mark.parametrize("before", stores.DATABASES)
def test_everything_comes_back_on_either_database(
    before: str, after: str, tmp_path: Path, sources: list[Path]
) -> None:
    old, new = stores.url(before), stores.url(after)
    fill(tmp_path / "store", sources, old)
    done = back_up(tmp_path / "store", old, tmp_path / "backup")
    assert (len(done.copied), done.manifest.lost) == (4, ())
    recovered = recover(tmp_path / "backup", tmp_path / "new", new)
    assert (recovered.adapters, recovered.left_out) == (4, ())
    assert everything(tmp_path / "new", new) == everything(tmp_path / "store", old)
    ids = [(tmp_path / name / "store-id").read_bytes() for name in ("store", "new")]
    assert ids[0] == ids[1]
    with Store(tmp_path / "new", new) as store:
        assert store.resolve("prod").id == "a@1"
        assert store.resolve("a@1").labels == {"team": "öps"}
        assert store.chat_template(store.resolve("b").chat_template_sha256) == "{{ messages }}"
        assert [v.error for v in store.verify_all()] == [None] * 4
        assert store.restore("gone").id == "gone@1"
        # What comes later takes numbers of its own.
        store.rebase("a@2", BASE.named("third"))
        assert store.register("a", sources[4], BASE, replace=True)[0].version == 3
        assert store.register("gone", sources[4], BASE, replace=True)[0].version == 2
    assert not list((tmp_path / "new").glob("recovering*"))


def test_a_backup_changes_nothing_in_the_store(root: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [f for f in root.rglob("*") if f.is_file() and not f.name.startswith("index.")]
        return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}

    before, index = state(), everything(root)
    back_up(root, "", tmp_path / "backup")
    assert (state(), everything(root)) == (before, index)


def test_only_what_is_new_is_copied_and_what_is_unused_is_pruned_on_request(
    root: Path, tmp_path: Path, sources: list[Path]
) -> None:
    place = tmp_path / "backup"
    first = back_up(root, "", place)
    again = back_up(root, "", place)
    assert again.copied == ()
    assert again.manifest.index == first.manifest.index
    with Store(root) as store:
        store.register("new", sources[4], BASE)
        gone = store.deleted()[0].digest
        store.gc(0)
    later = back_up(root, "", place)
    assert len(later.copied) == 1
    assert (later.pruned, (place / "blobs" / "sha256" / gone[7:]).is_dir()) == ((), True)
    assert len(list(place.glob("index-*.jsonl"))) == 1
    assert back_up(root, "", place, prune=True).pruned == (gone,)
    assert not (place / "blobs" / "sha256" / gone[7:]).exists()
    assert check_backup(place).damaged == {}


def test_nobody_else_can_read_a_backup(root: Path, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        back_up(root, "", tmp_path / "backup")
    finally:
        os.umask(old)
    for path in [tmp_path / "backup", *(tmp_path / "backup").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("point", WRITING)
def test_an_interrupted_backup_leaves_the_one_before_it_whole(
    point: str, last: int, root: Path, tmp_path: Path, sources: list[Path]
) -> None:
    place = tmp_path / "backup"
    if point != "backup.mark":
        back_up(root, "", place)
        with Store(root) as store:
            store.register("new", sources[4], BASE)
            store.delete("held")
            store.gc(0)
    reached = interrupted(point, last, lambda: back_up(root, "", place, prune=True))
    if point != "backup.mark":
        assert check_backup(place).damaged == {}
        recover(place, tmp_path / "early")
    assert reached or last > 1
    back_up(root, "", place, prune=True)
    assert check_backup(place).damaged == {}
    recover(place, tmp_path / "late")
    assert everything(tmp_path / "late") == everything(root)
    assert not (place / "work").exists()


class Injected(Exception):
    """The exception that a fault point raises."""


def interrupted(point: str, last: int, work: Callable[[], Any]) -> bool:
    """Runs `work`, which fails when it reaches a point for the `last` time; whether it did."""
    hits = 0

    def fail(reached: str) -> None:
        nonlocal hits
        hits += reached == point
        if reached == point and hits == last:
            raise Injected(point)

    try:
        with faults.injected(fail):
            work()
    except Injected:
        return True
    return False


@pytest.mark.parametrize(("database", "last"), [("sqlite", 1), ("sqlite", 3), ("postgresql", 1)])
@pytest.mark.parametrize("point", RECOVERING)
def test_a_half_recovered_store_cannot_be_opened_and_is_completed_by_the_same_command(
    point: str, last: int, database: str, root: Path, tmp_path: Path
) -> None:
    place, new, url = tmp_path / "backup", tmp_path / "new", stores.url(database)
    back_up(root, "", place)
    if interrupted(point, last, lambda: recover(place, new, url)):
        if point != "backup.recover.guard":  # before it there is nothing
            assert refusal(Store, new, url)[0] is Reason.STORE_UNAVAILABLE
        recover(place, new, url)
    else:
        assert last > 1
    assert everything(new, url) == everything(root)
    with Store(new, url) as store:
        assert all(verified.error is None for verified in store.verify_all())


def killed(point: str, work: Callable[[], Any]) -> bool:
    """Runs `work` in a process that ends at once when it reaches a point; whether it did."""
    child = os.fork()
    if child == 0:
        try:
            with faults.injected(lambda reached: os._exit(9) if reached == point else None):
                work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("point", sorted({*WRITING, *RECOVERING}))
def test_a_killed_process_leaves_the_same(
    point: str, root: Path, tmp_path: Path, sources: list[Path]
) -> None:
    place, new = tmp_path / "backup", tmp_path / "new"
    if point != "backup.mark":
        back_up(root, "", place)
    with Store(root) as store:
        store.register("new", sources[4], BASE)
        store.delete("held")
        store.gc(0)
    if point in WRITING:
        assert killed(point, lambda: back_up(root, "", place, prune=True))
        if point != "backup.mark":
            assert check_backup(place).damaged == {}
    back_up(root, "", place, prune=True)
    if point in RECOVERING:
        assert killed(point, lambda: recover(place, new))
        if point != "backup.recover.guard":
            assert refusal(Store, new)[0] is Reason.STORE_UNAVAILABLE
    recover(place, new)
    assert everything(new) == everything(root)
    with Store(new) as store:
        assert all(verified.error is None for verified in store.verify_all())


def damages(place: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(p for p in place.rglob("*") if p.is_file() and p.name != "lock"):
        for kind in ("cut", "flipped", "gone", "empty", "link", "directory", "fifo"):
            yield file, kind


def damage(file: Path, kind: str) -> None:
    data = file.read_bytes()
    file.unlink()
    match kind:
        case "cut":
            file.write_bytes(data[:-2])
        case "flipped":
            middle = len(data) // 2
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        case "empty":
            file.write_bytes(b"")
        case "link":
            file.with_name("elsewhere").write_bytes(data)
            file.symlink_to("elsewhere")
        case "directory":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)


def test_every_damage_of_every_file_is_noticed_before_anything_is_written(
    root: Path, tmp_path: Path
) -> None:
    back_up(root, "", tmp_path / "sound")
    names = [(f.relative_to(tmp_path / "sound"), k) for f, k in damages(tmp_path / "sound")]
    assert len(names) == 7 * (2 * 4 + 3)
    for name, kind in names:
        place = tmp_path / "damaged"
        shutil.copytree(tmp_path / "sound", place)
        damage(place / name, kind)
        assert refusal(recover, place, tmp_path / "new")[0] is Reason.BACKUP_INVALID, (name, kind)
        assert not (tmp_path / "new").exists()
        if name.parts[0] == "blobs":
            assert len(check_backup(place).damaged) == 1
            done = recover(place, tmp_path / "new", damaged=True)
            assert (done.adapters, len(done.left_out)) == (3, 1)
            with Store(tmp_path / "new") as store:
                assert sum(v.error is not None for v in store.verify_all()) == 1
            shutil.rmtree(tmp_path / "new")
        # The next backup makes it whole, or says that it cannot.
        try:
            back_up(root, "", place)
            after = check_backup(place)
        except Refusal as error:
            reason = error.reason
        else:
            reason = None
            # Bits that changed without a change of size are found by a verification only.
            assert after.damaged == {} or kind == "flipped"
        if reason is not None:
            assert reason in (Reason.BACKUP_INVALID, Reason.BACKUP_FAILED)
            assert name.parts[0] in ("backup.json", "manifest.json") or "index" in name.name
        shutil.rmtree(place)


def test_files_of_others_are_neither_touched_nor_taken_for_a_backup(
    root: Path, tmp_path: Path, sources: list[Path]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert refusal(back_up, root, "", tmp_path / "mine")[0] is Reason.BACKUP_FAILED
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]
    assert refusal(recover, tmp_path / "mine", tmp_path / "new")[0] is Reason.BACKUP_INVALID
    assert refusal(back_up, root, "", root)[0] is Reason.BACKUP_FAILED
    fill(tmp_path / "other", sources)
    back_up(tmp_path / "other", "", tmp_path / "backup")
    assert refusal(back_up, root, "", tmp_path / "backup")[0] is Reason.BACKUP_INVALID
    # Files beside those of a backup are left alone.
    for name in ("letter.txt", "index-notes.txt", "blobs/sha256/README"):
        (tmp_path / "backup" / name).write_text("dear")
    back_up(tmp_path / "other", "", tmp_path / "backup", prune=True)
    assert (tmp_path / "backup" / "index-notes.txt").read_text() == "dear"
    assert (tmp_path / "backup" / "blobs" / "sha256" / "README").read_text() == "dear"
    assert check_backup(tmp_path / "backup").damaged == {}


@pytest.mark.parametrize("folder", ["work", "blobs", "blobs/sha256"])
def test_a_link_in_place_of_a_folder_is_refused(folder: str, root: Path, tmp_path: Path) -> None:
    place = tmp_path / "backup"
    back_up(root, "", place)
    elsewhere = tmp_path / "elsewhere"
    if (place / folder).exists():
        (place / folder).rename(elsewhere)
    else:
        elsewhere.mkdir()
        (elsewhere / "letter.txt").write_text("dear")
    (place / folder).symlink_to(elsewhere)
    before = sorted(os.listdir(elsewhere))
    assert refusal(back_up, root, "", place)[0] is Reason.BACKUP_INVALID
    assert sorted(os.listdir(elsewhere)) == before


def test_a_store_is_never_recovered_over_another(
    root: Path, tmp_path: Path, sources: list[Path]
) -> None:
    back_up(root, "", tmp_path / "backup")
    for occupied in ("store", "file", "other"):
        place = tmp_path / occupied
        if occupied == "file":
            place.write_text("x")
        elif occupied == "other":
            place.mkdir()
            (place / "letter.txt").write_text("dear")
        assert refusal(recover, tmp_path / "backup", place)[0] is Reason.STORE_EXISTS, occupied
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"
    with Store(root) as store:
        assert store.resolve("a").version == 2
    # What may lie in a new place does no harm.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "lost+found").mkdir()
    recover(tmp_path / "backup", tmp_path / "new")


def test_a_database_of_another_store_is_never_overwritten(
    root: Path, tmp_path: Path, sources: list[Path]
) -> None:
    url = stores.url("postgresql")
    fill(tmp_path / "live", sources, url)
    live = everything(tmp_path / "live", url)
    back_up(root, "", tmp_path / "backup")
    back_up(tmp_path / "live", url, tmp_path / "own")
    for backup in ("backup", "own"):
        for _ in range(2):  # the second time with what the first one left
            found = refusal(recover, tmp_path / backup, tmp_path / f"new-{backup}", url)
            assert found[0] is Reason.STORE_EXISTS
    assert everything(tmp_path / "live", url) == live


def test_a_collection_in_the_middle_costs_nothing_that_is_still_named(
    root: Path, tmp_path: Path
) -> None:
    collected: list[int] = []

    def collect(point: str) -> None:
        if point == "backup.dump.sync" and not collected:
            with Store(root) as store:
                collected.append(len(store.gc(0).digests))

    with faults.injected(collect):
        done = back_up(root, "", tmp_path / "backup")
    assert collected == [1]
    assert (len(done.manifest.blobs), done.manifest.lost) == (3, ())
    assert check_backup(tmp_path / "backup").damaged == {}
    recover(tmp_path / "backup", tmp_path / "new")
    assert everything(tmp_path / "new") == everything(root)


def test_what_the_store_has_lost_is_named_and_an_earlier_copy_is_kept(
    root: Path, tmp_path: Path
) -> None:
    with Store(root) as store:
        one, two = store.resolve("b").digest, store.resolve("a").digest
        places = {digest: store.path(digest) for digest in (one, two)}
    back_up(root, "", tmp_path / "early")
    shutil.rmtree(places[one])
    (places[two] / WEIGHTS_FILE).chmod(0o644)
    (places[two] / WEIGHTS_FILE).write_bytes(b"damaged")
    done = back_up(root, "", tmp_path / "late")
    assert set(done.manifest.lost) == {one, two}
    assert recover(tmp_path / "late", tmp_path / "half").left_out == tuple(sorted((one, two)))
    assert back_up(root, "", tmp_path / "early").manifest.lost == ()
    recover(tmp_path / "early", tmp_path / "whole")
    with Store(tmp_path / "whole") as store:
        assert all(verified.error is None for verified in store.verify_all())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("point", ["backup.dump.write", "backup.copy.write", "backup.commit.index"])
def test_a_failing_disk_is_a_typed_error(
    point: str, number: int, root: Path, tmp_path: Path
) -> None:
    def fail(reached: str) -> None:
        if reached == point:
            raise OSError(number, os.strerror(number), "somewhere")

    with faults.injected(fail):
        reason = refusal(back_up, root, "", tmp_path / "backup")[0]
    full = number == errno.ENOSPC
    assert reason is (Reason.DISK_FULL if full else Reason.BACKUP_FAILED)
    back_up(root, "", tmp_path / "backup")
    with faults.injected(lambda reached: fail(point) if reached == "backup.copy.write" else None):
        reason = refusal(recover, tmp_path / "backup", tmp_path / "new")[0]
    assert reason is (Reason.STORE_FULL if full else Reason.STORE_UNAVAILABLE)
    recover(tmp_path / "backup", tmp_path / "new")


def test_two_backups_at_once_do_not_meet(root: Path, tmp_path: Path) -> None:
    inner: list[Reason] = []

    def again(point: str) -> None:
        if point == "backup.dump.sync" and not inner:
            inner.append(Reason.BUSY)
            assert refusal(back_up, root, "", tmp_path / "backup")[0] is Reason.BUSY

    with faults.injected(again):
        back_up(root, "", tmp_path / "backup")
    assert inner
    assert check_backup(tmp_path / "backup").damaged == {}


@pytest.mark.parametrize("database", stores.DATABASES)
def test_backups_while_servers_change_the_store_are_all_consistent(
    database: str, tmp_path: Path, sources: list[Path]
) -> None:
    root, url, over = tmp_path / "store", stores.url(database), threading.Event()
    fill(root, sources, url)
    problems: list[BaseException] = []

    def change(name: str) -> None:
        try:
            with Store(root, url) as store:
                count = 0
                while not over.is_set():
                    store.register(name, sources[count % 5], BASE, replace=True)
                    store.set_alias(f"{name}-now", name)
                    if count % 3 == 2:
                        store.delete(name)
                        store.gc(0)
                    count += 1
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=change, args=(f"x{i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(6):
            done = back_up(root, url, tmp_path / "backup", prune=number % 2 == 0)
            assert done.manifest.lost == ()
            assert check_backup(tmp_path / "backup").damaged == {}
            recover(tmp_path / "backup", tmp_path / f"new-{number}")
            with Store(tmp_path / f"new-{number}") as store:
                assert all(verified.error is None for verified in store.verify_all())
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not problems


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("backup.json", '"format":1', '"format":2'),
        ("manifest.json", '"format":1', '"format":3'),
        ("manifest.json", '"schema_version":2', '"schema_version":3'),
    ],
)
def test_a_backup_of_a_newer_version_is_refused(
    file: str, old: str, new: str, root: Path, tmp_path: Path
) -> None:
    place = tmp_path / "backup"
    back_up(root, "", place)
    text = (place / file).read_text()
    assert old in text
    if file == "manifest.json":
        body, _, _ = text.removeprefix('{"body":').partition(',"sha256":"')
        changed = body.replace(old, new)
        digest = hashlib.sha256(changed.encode()).hexdigest()
        (place / file).write_text(f'{{"body":{changed},"sha256":"{digest}"}}\n')
    else:
        (place / file).write_text(text.replace(old, new))
    reason, _ = refusal(recover, place, tmp_path / "new")
    assert reason is Reason.BACKUP_INVALID


def test_a_store_that_is_not_there_or_not_up_to_date_is_not_backed_up(
    root: Path, tmp_path: Path
) -> None:
    assert refusal(back_up, tmp_path / "none", "", tmp_path / "b")[0] is Reason.STORE_UNAVAILABLE
    assert not (tmp_path / "none").exists()
    with sqlite3.connect(root / "index.sqlite3") as index:
        index.execute("DROP TABLE version_texts")
    assert refusal(back_up, root, "", tmp_path / "b")[0] is Reason.STORE_UNAVAILABLE
    assert not (tmp_path / "b").exists()
