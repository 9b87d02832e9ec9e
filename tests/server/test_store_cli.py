"""`loraplex-server store`: what it prints, how it exits, and that servers may run meanwhile."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from loraplex_adapters.format.config import FINGERPRINT_KEY
from loraplex_adapters.store import Store
from loraplex_server.commands import store_cli
from loraplex_server.commands.program import app
from loraplex_server.config_sources import load
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from adapters import stores
from model import tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(store_cli, "load_base_info", lambda config: BASE)

    def invoke(*arguments: str, at: Path = root) -> Result:
        return CliRunner().invoke(app, ["store", *arguments, "--store", str(at)])

    return invoke


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return stores.adapters(tmp_path, 2)


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_adapter_is_imported_listed_and_found_by_an_open_store(
    run: Any, root: Path, sources: list[Path]
) -> None:
    with Store(root) as serving:
        made = parsed(
            run("import", str(sources[0]), "--name", "a", "--label", "team=ops", "--json")
        )
        assert (made["name"], made["version"], made["created"]) == ("a", 1, True)
        record = serving.resolve("a")
        assert made["digest"] == record.digest
        assert made["base_fingerprint"] == BASE.fingerprint
        run("import", str(sources[0]), "--name", "b")
        (listed,) = parsed(run("ls", "--label", "team=ops", "--json"))
        assert listed == {k: v for k, v in made.items() if k != "created"}
        assert [r["name"] for r in parsed(run("ls", "--json"))] == ["a", "b"]
        shown = run("ls").stdout
        assert "a@1" in shown
        assert "team=ops" in shown
        assert record.digest[7:19] in shown
        assert parsed(run("import", str(sources[0]), "--name", "a", "--json"))["created"] is False


def test_a_name_is_replaced_only_with_the_flag(run: Any, sources: list[Path]) -> None:
    run("import", str(sources[0]), "--name", "a")
    refused = run("import", str(sources[1]), "--name", "a")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ADAPTER_CONFLICT: ")
    assert run("import", str(sources[1]), "--name", "a", "--replace").exit_code == 0
    assert [r["version"] for r in parsed(run("ls", "--versions", "--json"))] == [2, 1]


def test_a_refused_adapter_is_told_with_all_that_is_wrong(run: Any, tmp_path: Path) -> None:
    directory = stores.adapter(tmp_path / "bad", r="x", bias="some")
    refused = run("import", str(directory), "--name", "a")
    assert refused.exit_code == 1
    assert len(refused.stderr.strip().splitlines()) == 2


def test_aliases_are_set_moved_listed_and_deleted(run: Any, sources: list[Path]) -> None:
    for source in sources:
        run("import", str(source), "--name", "a", "--replace")
    assert "no aliases" in run("alias").stdout
    assert parsed(run("alias", "prod", "a@1", "--expected", "", "--json"))["version"] == 1
    assert run("alias", "prod", "a@2", "--expected", "a@2").exit_code == 1
    assert run("alias", "prod", "a").exit_code == 0
    assert [(a["alias"], a["version"]) for a in parsed(run("alias", "--json"))] == [("prod", 2)]
    assert "a@2" in run("alias").stdout
    assert run("alias", "prod").exit_code == 2
    assert run("alias", "prod", "--delete").exit_code == 0
    assert parsed(run("alias", "--json")) == []
    assert run("alias", "prod", "--delete").exit_code == 1


def test_verify_exits_with_1_when_something_is_damaged(
    run: Any, root: Path, sources: list[Path]
) -> None:
    run("import", str(sources[0]), "--name", "sound")
    made = parsed(run("import", str(sources[1]), "--name", "a", "--json"))
    assert parsed(run("verify", "--json")) == {"checked": 2, "damaged": []}
    (root / "blobs" / "sha256" / made["digest"][7:] / "adapter_config.json").unlink()
    result = run("verify", "--json")
    assert result.exit_code == 1
    (damaged,) = json.loads(result.stdout)["damaged"]
    assert (damaged["digest"], damaged["versions"]) == (made["digest"], ["a@1"])
    assert "2 checked, 1 damaged" in run("verify").stdout
    assert run("verify", "sound").exit_code == 0
    assert run("verify", "a").exit_code == 1
    assert run("verify", "unknown").exit_code == 1


@pytest.mark.fault("adapter-kills-engines")
def test_a_quarantine_is_shown_and_released(run: Any, root: Path, sources: list[Path]) -> None:
    made = parsed(run("import", str(sources[0]), "--name", "a", "--json"))
    run("import", str(sources[1]), "--name", "b")
    assert run("release", "a").exit_code == 1
    with Store(root) as serving:
        serving.quarantine(made["digest"], "it ended the engine 3 times")
    assert "quarantined: it ended the engine 3 times" in run("ls").stdout
    (held,) = (r["quarantine"] for r in parsed(run("ls", "--json")) if r["quarantine"])
    assert (held["digest"], held["reason"]) == (made["digest"], "it ended the engine 3 times")
    assert "a@1: quarantined: it ended the engine 3 times" in run("verify").stdout
    assert parsed(run("verify", "--json"))["quarantined"] == [held]
    assert "quarantined" not in run("verify", "b").stdout
    assert run("release", made["digest"]).exit_code == 0
    assert "quarantined" not in run("ls").stdout
    with Store(root) as serving:
        serving.quarantine(made["digest"], "again")
    assert parsed(run("release", "a@1", "--json")) == {"digest": made["digest"], "released": True}


@pytest.mark.fault("base-changed-under-store")
def test_adapters_of_another_base_are_shown_checked_and_recorded(
    run: Any, root: Path, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stamped = stores.adapter(tmp_path / "stamped", 7, **{FINGERPRINT_KEY: BASE.fingerprint})
    for source, name in ((sources[0], "a"), (sources[1], "a"), (stamped, "stamped")):
        run("import", str(source), "--name", name, "--replace")
    other = replace(BASE, fingerprint="sha256:" + "b" * 64)
    monkeypatch.setattr(store_cli, "load_base_info", lambda config: other)
    run("import", str(sources[0]), "--name", "new", "--model", "models/other")
    assert "other (bbbbbbbbbbbb)" in run("ls").stdout
    assert "1 for the base other (bbbbbbbbbbbb): new@1" in run("verify").stdout
    assert list(parsed(run("verify", "--json"))["bases"].values()) == [
        ["a@2", "stamped@1"],
        ["new@1"],
    ]
    assert parsed(run("rebase", "--json")) == []
    with Store(root) as serving:
        before = serving.change_counter()
        one = parsed(run("rebase", "a", "--model", "models/other", "--json"))
        assert [r["base_fingerprint"] for r in one["recorded"]] == [other.fingerprint]
        assert serving.resolve("a").base_name == "other"
        assert serving.change_counter() == before + 1
    # The stamp in the files says which base it was made for: nobody can overrule it.
    result = run("rebase", "--all", "--model", "models/other")
    assert result.exit_code == 1
    assert "a@1: recorded for other (bbbbbbbbbbbb)" in result.stdout
    assert "stamped@1: the adapter was made for the base" in result.stdout
    assert "1 recorded, 1 refused" in result.stdout
    moves = [(m["name"], m["version"]) for m in parsed(run("rebase", "--json"))]
    assert moves == [("a", 2), ("a", 1)]
    assert "a@2" in run("rebase").stdout
    smaller = replace(other, config=replace(BASE.config, hidden_size=16), fingerprint="sha256:c")
    monkeypatch.setattr(store_cli, "load_base_info", lambda config: smaller)
    refused = run("rebase", "new", "--json")
    assert refused.exit_code == 1
    with Store(root) as serving:
        assert serving.resolve("new").base_fingerprint == other.fingerprint


@pytest.mark.fault("blob-missing-at-start")
def test_adapters_without_files_are_reported_and_removed(
    run: Any, root: Path, sources: list[Path]
) -> None:
    made = parsed(run("import", str(sources[0]), "--name", "a", "--json"))
    shutil.rmtree(root / "blobs" / "sha256" / made["digest"][7:])
    result = run("verify")
    assert result.exit_code == 1
    assert "a@1: the stored adapter" in result.stdout
    assert "its files are missing" in result.stdout
    assert "its files are missing" in run("verify", "a").stdout
    assert parsed(run("rm", "a", "--json")) == {"name": "a", "deleted": True}
    assert run("rm", "a").exit_code == 1
    assert run("gc", "--grace-days", "0").exit_code == 0
    assert parsed(run("verify", "--json")) == {"checked": 0, "damaged": []}


def test_what_was_deleted_is_restored_or_collected(
    run: Any, root: Path, sources: list[Path]
) -> None:
    run("import", str(sources[0]), "--name", "a")
    with Store(root) as store:
        store.delete("a")
        assert [r["name"] for r in parsed(run("ls", "--deleted", "--json"))] == ["a"]
        assert parsed(run("restore", "a", "--json"))["version"] == 1
        digest = store.resolve("a").digest
        assert run("restore", "a").exit_code == 1
        store.delete("a")
        assert parsed(run("gc", "--json"))["digests"] == []
        tried = parsed(run("gc", "--grace-days", "0", "--dry-run", "--json"))
        assert (tried["digests"], tried["versions"], tried["dry_run"]) == ([digest], ["a@1"], True)
        done = parsed(run("gc", "--grace-days", "0", "--json"))
        assert done == {**tried, "dry_run": False}
        assert done["bytes"] > 0
        assert "no adapters" in run("ls", "--deleted").stdout
        assert not stores.blobs(root)


def test_what_cannot_be_opened_has_its_own_exit_code(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    unusable = run("ls", at=tmp_path / "file")
    assert unusable.exit_code == 5
    assert unusable.stderr.startswith("error: STORE_UNAVAILABLE: ")
    assert run("ls", "--store-url", "mysql://secret@x/y").exit_code == 5
    assert "secret" not in run("ls", "--store-url", "mysql://secret@x/y").output
    assert run("ls", "--config", str(tmp_path / "none.toml")).exit_code == 2
    Store(tmp_path / "store").close()
    assert run("ls", "--label", "nonsense").exit_code == 2
    assert run("ls", "--label", "A=1").exit_code == 1


def test_a_shared_database_is_used_when_it_is_named(
    run: Any, root: Path, sources: list[Path]
) -> None:
    address = stores.url("postgresql")
    run("import", str(sources[0]), "--name", "a", "--store-url", address)
    with Store(root, address) as store:
        assert store.resolve("a").version == 1
    assert not (root / "index.sqlite3").exists()


def test_the_password_of_the_database_is_not_shown() -> None:
    config = load(None, {"store_url": "postgresql://u:secret@host/x"})
    assert not any("secret" in line for line in config.lines())
    assert "secret" not in repr(config)


def test_the_shapes_of_the_base_come_from_its_files(tmp_path: Path) -> None:
    tiny.write("qwen3-window-bias", tmp_path / "model")
    config = load(None, {"model": str(tmp_path / "model"), "cache": str(tmp_path / "cache")})
    base = store_cli.load_base_info(config)
    shapes = base.config
    assert shapes.projection_shapes()["k_proj"] == (shapes.hidden_size, shapes.kv_size)
    assert shapes.biased == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (shapes.qk_norm, shapes.tie_embeddings, shapes.head_dim) == (True, True, 16)
    assert base.fingerprint.startswith("sha256:")
    assert store_cli.load_base_info(config) == base, "from the cache"
    command = f"store import {tmp_path} --name a --model {tmp_path}/none --store {tmp_path}/store"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 4, result.output


READING = [["ls"], ["verify"], ["gc"], ["rm", "a"], ["alias"], ["restore", "a"], ["release", "a"]]


@pytest.mark.parametrize("command", READING, ids=lambda words: words[0])
@pytest.mark.parametrize("what", ["missing", "another directory"])
def test_a_mistyped_store_is_an_error_and_not_a_new_store(
    run: Any, tmp_path: Path, command: list[str], what: str
) -> None:
    place = tmp_path / "stroe"
    if what != "missing":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    refused = run(*command, at=place)
    assert refused.exit_code == 5
    assert refused.stderr.startswith(f"error: STORE_UNAVAILABLE: {place}: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_is_refused_comes_with_one_that_is_not(run: Any, sources: list[Path]) -> None:
    refused = run("import", str(sources[0]), "--name", "Org/Name_v1.2")
    assert refused.exit_code == 1
    assert 'did you mean "org-name-v1-2"?' in refused.stderr
    assert run("import", str(sources[0]), "--name", "org-name-v1-2").exit_code == 0


def test_an_adapter_with_foreign_names_is_imported_by_order_only(run: Any, tmp_path: Path) -> None:
    plain = stores.adapter(tmp_path / "plain")
    digest = parsed(run("import", str(plain), "--name", "plain", "--json"))["digest"]
    foreign = prefixed(plain, tmp_path / "foreign", "_orig_mod.")
    refused = run("import", str(foreign), "--name", "a")
    assert refused.exit_code == 1
    assert "--convert" in refused.stderr
    tried = parsed(run("import", str(foreign), "--name", "a", "--convert", "--dry-run", "--json"))
    assert tried["dry_run"] is True
    assert "_orig_mod." in tried["converted"][0]
    assert [record["name"] for record in parsed(run("ls", "--json"))] == ["plain"]
    made = parsed(run("import", str(foreign), "--name", "a", "--convert", "--json"))
    assert made["digest"] == tried["digest"]
    assert (made["rank"], made["name"]) == (4, "a")
    again = parsed(run("import", str(plain), "--name", "b", "--convert", "--json"))
    assert (again["digest"], again["converted"]) == (digest, ["nothing to convert"])
    assert run("import", str(plain), "--name", "c", "--alpha", "2").exit_code == 2


def prefixed(source: Path, target: Path, prefix: str) -> Path:
    """A copy of an adapter whose tensors have a prefix."""
    target.mkdir()
    shutil.copy(source / "adapter_config.json", target)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {prefix + name: value for name, value in tensors.items()},
        target / "adapter_model.safetensors",
    )
    return target
