"""`store backup`, `store recover` and `sign`: what they print, and how they exit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from cryptography.hazmat.primitives.asymmetric import ec
from loraplex_adapters.signing import read_policy
from loraplex_adapters.store import Store
from loraplex_server.commands import store_cli
from loraplex_server.commands.program import app
from typer.testing import CliRunner, Result

from adapters import keys, stores


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default directory of training jobs is not that of somebody's server."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with Store(tmp_path / "store") as store:
        for number, source in enumerate(stores.adapters(tmp_path, 2)):
            store.register(f"a{number}", source, BASE)
    return tmp_path / "store"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def parsed(result: Result) -> Any:
    return json.loads(result.stdout)


def test_a_backup_is_made_verified_and_recovered(root: Path, tmp_path: Path) -> None:
    place, new = tmp_path / "backup", tmp_path / "new"
    done = run("store", "backup", place, "--store", root)
    assert (done.exit_code, "2 versions of 2 adapters" in done.stdout) == (0, True), done.output
    again = parsed(run("store", "backup", place, "--store", root, "--json"))
    assert (again["copied"], len(again["blobs"]), again["lost"]) == ([], 2, [])
    # A verification needs no store.
    checked = run("store", "backup", place, "--verify", "--store", tmp_path / "none")
    assert (checked.exit_code, checked.stdout) == (0, "2 adapters are intact, 0 damaged\n")
    done = run("store", "recover", place, "--store", new)
    assert (done.exit_code, done.stdout) == (0, "recovered 2 versions of 2 adapters\n")
    listed = [parsed(run("store", "ls", "--json", "--store", each)) for each in (root, new)]
    assert listed[0] == listed[1]
    refused = run("store", "recover", place, "--store", new)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: STORE_EXISTS: ")


def test_damage_is_named_and_is_exit_code_1(root: Path, tmp_path: Path) -> None:
    place = tmp_path / "backup"
    run("store", "backup", place, "--store", root)
    blob = sorted((place / "blobs" / "sha256").iterdir())[0]
    (blob / "adapter_config.json").write_text("{}")
    checked = run("store", "backup", place, "--verify")
    assert checked.exit_code == 1
    assert blob.name in checked.stdout
    refused = run("store", "recover", place, "--store", tmp_path / "new")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: BACKUP_INVALID: ")
    assert "--damaged" in refused.stderr
    done = run("store", "recover", place, "--store", tmp_path / "new", "--damaged", "--json")
    assert parsed(done)["left_out"] == [f"sha256:{blob.name}"]
    # What the store itself has lost is named too, and everything else is backed up.
    shutil.rmtree(root / "blobs" / "sha256" / blob.name)
    lost = run("store", "backup", tmp_path / "other", "--store", root, "--json")
    assert (lost.exit_code, parsed(lost)["lost"]) == (1, [f"sha256:{blob.name}"])
    assert len(parsed(lost)["blobs"]) == 1


@pytest.mark.parametrize("command", ["backup", "recover"])
def test_a_store_that_cannot_be_used_is_exit_code_5(
    command: str, root: Path, tmp_path: Path
) -> None:
    run("store", "backup", tmp_path / "backup", "--store", root)
    place, store = tmp_path / "backup", tmp_path / "none"
    if command == "recover":
        (tmp_path / "file").touch()
        store = tmp_path / "file" / "store"
    refused = run("store", command, place, "--store", store)
    assert refused.exit_code == 5, refused.output
    assert refused.stderr.startswith("error: STORE_UNAVAILABLE: ")


def test_an_import_needs_the_signature_that_sign_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_cli, "load_base_info", lambda config: BASE)
    source = stores.adapter(tmp_path / "source")
    (tmp_path / "private.pem").write_bytes(keys.make_key(tmp_path, "release", password=b"word"))
    policy = keys.write_policy(tmp_path, release=["prod-"])
    importing = ("store", "import", source, "--store", tmp_path / "store", "--name", "prod-a")
    signed = ("--adapter-signatures", policy, "--signature", source / "model.sig")
    for dry in ([], ["--dry-run"]):
        refused = run(*importing, "--adapter-signatures", policy, *dry)
        assert refused.exit_code == 1
        assert refused.stderr.startswith("error: SIGNATURE_INVALID: ")
    signing = ("sign", source, "--name", "prod-a", "--key", tmp_path / "private.pem")
    assert run(*signing).exit_code == 1  # without the key's password
    monkeypatch.setenv("LORAPLEX_SIGNING_PASSWORD", "word")
    assert run(*signing).exit_code == 0
    assert run(*importing, *signed, "--dry-run").exit_code == 0
    done = run(*importing, *signed)
    assert done.exit_code == 0, done.output
    assert "note: signed by the key release" in done.stdout
    assert run(*importing[:-1], "prod-b", *signed).exit_code == 1
    # Without the setting a signature is not looked at.
    assert run(*importing[:-1], "dev-a", "--signature", source / "model.sig").exit_code == 0


def test_sign_says_what_is_wrong(tmp_path: Path) -> None:
    source = stores.adapter(tmp_path / "source")
    (tmp_path / "private.pem").write_bytes(keys.make_key(tmp_path, "a", ec.SECP384R1()))
    (tmp_path / "damaged.pem").write_text("-----BEGIN PRIVATE KEY-----\nx\n")

    def sign(folder: Path, name: str, key: str, *more: object) -> Result:
        return run("sign", folder, "--name", name, "--key", tmp_path / key, *more)

    assert sign(source, "A b", "private.pem").exit_code == 1
    assert sign(source, "a", "damaged.pem").exit_code == 1
    assert sign(tmp_path / "none", "a", "private.pem").exit_code == 1
    assert sign(source, "a", "none.pem").exit_code == 2
    assert not (source / "model.sig").exists()
    assert sign(source, "a", "private.pem", "--out", tmp_path / "a.sig").exit_code == 0
    policy = read_policy(keys.write_policy(tmp_path, a=[""]))
    assert policy.check(source, "a", (tmp_path / "a.sig").read_bytes()) == "a"
