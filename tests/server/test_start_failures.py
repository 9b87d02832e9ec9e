"""Whatever keeps a server from starting is one line for the operator and a documented exit code."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from loraplex_adapters.store import Store
from loraplex_model.base import faults
from loraplex_server import app, cli
from loraplex_server.commands import program, store_cli
from loraplex_server.config_sources import ConfigError, load
from loraplex_server.runtime import parts
from rpc.harness import config_for
from server.test_process import TESTS, outcome, start, write_config
from typer.testing import CliRunner

from adapters import stores

pytestmark = pytest.mark.fault("start-failure-untyped")

SETTINGS, MODEL, STORE = 2, 4, 5


def starts(folder: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> tuple[int, str]:
    """Exit code of a server in this process, which must not start, and its last line."""
    code = asyncio.run(asyncio.wait_for(app.run(config_for(folder, **settings)), 60))
    return code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def engine_finds_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with an adapter."""
    (source,) = stores.adapters(tmp_path, 1)
    with Store(tmp_path / "store") as store:
        store.register("a", source, BASE)
    return tmp_path / "store"


def change(sql: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        with sqlite3.connect(root / "index.sqlite3") as index:
            index.executescript(sql)

    return damage


def not_a_database(root: Path) -> None:
    (root / "index.sqlite3").write_bytes(b"not a database " * 1000)


def cut_short(root: Path) -> None:
    data = (root / "index.sqlite3").read_bytes()
    (root / "index.sqlite3").write_bytes(data[: len(data) // 3])


def overwritten_in_the_middle(root: Path) -> None:
    data = bytearray((root / "index.sqlite3").read_bytes())
    data[1000:-1000] = os.urandom(len(data) - 2000)
    (root / "index.sqlite3").write_bytes(data)


def replaced(name: str, by: str) -> Callable[[Path], None]:
    """What replaces a part of the store by a file, a directory, a FIFO or a loop of links."""

    def damage(root: Path) -> None:
        place = root / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        match by:
            case "file":
                place.write_text("x")
            case "directory":
                place.mkdir()
                (place / "file").touch()
            case "fifo":
                os.mkfifo(place)
            case _:
                place.symlink_to(place)

    damage.__name__ = f"{name} is a {by}"
    return damage


STORES: dict[str, Callable[[Path], None]] = {
    "not a database": not_a_database,
    "cut short": cut_short,
    "overwritten": overwritten_in_the_middle,
    "another version": change("UPDATE meta SET value = '99' WHERE key = 'schema_version'"),
    "no version": change("DELETE FROM meta"),
    "no count of changes": change("DELETE FROM meta WHERE key = 'changes'"),
    "a count that is none": change("UPDATE meta SET value = 'x' WHERE key = 'changes'"),
    "another store's": change("UPDATE meta SET value = 'x' WHERE key = 'store_id'"),
    "no tables": change("DROP TABLE aliases; DROP TABLE labels; DROP TABLE blobs"),
    "no columns": change("ALTER TABLE versions DROP COLUMN created_at"),
    "an empty index": lambda root: (root / "index.sqlite3").write_bytes(b""),
    "no index": lambda root: (root / "index.sqlite3").unlink(),
    "a store-id with rubbish": lambda root: (root / "store-id").write_bytes(bytes(range(256))),
    "an empty store-id": lambda root: (root / "store-id").write_bytes(b""),
    **{
        damage.__name__: damage
        for damage in (
            replaced("", "file"),
            replaced("index.sqlite3", "directory"),
            replaced("index.sqlite3", "loop"),
            replaced("store-id", "directory"),
            replaced("store-id", "loop"),
            replaced("store-id", "fifo"),
            replaced("lock", "directory"),
            replaced("blobs", "file"),
            replaced("blobs/sha256", "loop"),
            replaced("staging", "file"),
            replaced("trash", "file"),
            replaced("trash", "loop"),
            replaced("uploads", "file"),
        )
    },
}


@pytest.mark.parametrize("damage", STORES.values(), ids=STORES.keys())
def test_a_damaged_store_is_reported(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(root)
    code, said = starts(tmp_path, capsys)
    assert (code, said[:7]) == (STORE, "error: ")
    # The commands on the store say the same.
    result = CliRunner().invoke(program.app, ["store", "ls", "--store", str(root)])
    assert result.exit_code == STORE, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith("error: STORE_UNAVAILABLE: ")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE]
)
@pytest.mark.parametrize("point", ["store.open.make", "store.open.session", "store.index.commit"])
def test_a_failing_disk_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], point: str, number: int
) -> None:
    def fail(reached: str) -> None:
        if reached == point:
            raise OSError(number, os.strerror(number), "somewhere")

    with faults.injected(fail):
        code, said = starts(tmp_path, capsys)
    assert (code, said[:7]) == (STORE, "error: ")


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        *product(["store", "import_root"], ["a file", "below a file", "a loop", "not to be made"]),
        ("training_jobs_dir", "below a file"),
    ],
)
def test_a_folder_that_cannot_be_made_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, what: str
) -> None:
    place = tmp_path / "place"
    match what:
        case "a file":
            place.touch()
        case "below a file":
            place.touch()
            place /= "folder"
        case "a loop":
            place.symlink_to(place)
        case _:
            place = Path("/proc/self/folder")
    code, said = starts(tmp_path, capsys, training=True, **{setting: place})
    assert (code, said[:7]) == (STORE, "error: ")


@pytest.mark.parametrize("place", ["imprt", "elsewhere/import"])
def test_a_mistyped_import_root_is_an_error_and_not_a_new_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    code, said = starts(tmp_path, capsys, import_root=tmp_path / place)
    assert (code, said[:7]) == (STORE, "error: ")
    assert str(tmp_path / place) in said
    assert "--import-root" in said
    assert not (tmp_path / place).exists()


def test_the_default_import_root_is_made_beside_its_store(tmp_path: Path) -> None:
    config = load(None, {"store": str(tmp_path / "store"), "import_root": str(tmp_path / "import")})
    config.prepare_import_root()
    assert (tmp_path / "import").is_dir()
    assert load(None, {"store": str(tmp_path / "store")}).makes_import_root
    assert not load(None, {"import_root": str(tmp_path / "import")}).makes_import_root


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", None), ("tokenizer.json", b"{}"), ("model.json", b"[")]
)
def test_a_model_without_a_tokenizer_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None
) -> None:
    config = config_for(tmp_path)
    place = tmp_path / "model" / file
    place.unlink()
    if content is not None:
        place.write_bytes(content)
    assert config.engine_options is not None
    code = asyncio.run(asyncio.wait_for(app.run(config), 60))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (code, said[:7]) == (MODEL, "error: ")


@pytest.mark.parametrize(("name", "text"), [("ENGINE_OPTIONS", "{"), ("TRAINER", "[")])
def test_invalid_environment_variables_are_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"LORAPLEX_{name}", text)
    with pytest.raises(ConfigError, match=name.lower()):
        load(None, {})


def test_one_job_that_cannot_be_read_stops_no_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = tmp_path / "jobs"
    (jobs / "0123456789ab-01234567" / "job.json").mkdir(parents=True)
    (jobs / "0123456789ab-01234568").touch()

    async def run() -> None:
        server = app.Server(config_for(tmp_path, training=True, training_jobs_dir=jobs))
        try:
            await server.start()
        finally:
            await server.close()

    asyncio.run(run())


def test_an_error_that_nobody_expected_is_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(parts, "TextTokenizer", broken)
    monkeypatch.setattr(store_cli, "Store", broken)
    (tmp_path / "lock").touch()  # a store, as far as names tell
    listing = ["store", "ls", "--store", str(tmp_path)]
    for command in (["serve", "--config", str(write_config(tmp_path))], listing):
        monkeypatch.setattr(sys, "argv", ["loraplex-server", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 8
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: an unexpected error, ZeroDivisionError, ended the command")


def test_the_process_says_what_is_wrong_with_its_index(tmp_path: Path, root: Path) -> None:
    file = write_config(tmp_path)
    not_a_database(root)
    code, said = outcome(start(file))
    assert code == STORE
    assert said == "error: the adapter store's index cannot be used: file is not a database"


def test_the_process_says_what_is_wrong_with_its_settings_file(tmp_path: Path) -> None:
    code, said = outcome(start(tmp_path))
    assert code == 2
    assert said == f"error: cannot read {tmp_path}: Is a directory"


def test_an_unknown_instruction_set_is_reported_before_anything_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_ISA", "avx9")
    code, said = starts(tmp_path, capsys)
    assert (code, said[:31]) == (SETTINGS, "error: LORAPLEX_ISA is 'avx9', ")
    assert not (tmp_path / "store").exists()
