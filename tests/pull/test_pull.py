"""`loraplex pull`: what it fetches from hubs, buckets and folders, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex.cli import app
from loraplex.sources import AdapterAddress, PullFailed, fetching, pull, remote
from loraplex.uploads import Files
from pull import bucket, fake_hub
from rpc.harness import write_adapter
from typer.testing import CliRunner, Result

COMMIT, OTHER = "a" * 40, "b" * 40
NAMES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def hub() -> Iterator[fake_hub.Hub]:
    with fake_hub.hub() as found:
        yield found


@pytest.fixture(scope="module")
def s3() -> Iterator[bucket.S3]:
    with bucket.s3() as found:
        yield found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter's folder with files that are not fetched."""
    folder = write_adapter(tmp_path / "from" / "Lora_A")
    (folder / "README.md").write_text("x" * 100)
    (folder / "optimizer.pt").write_bytes(b"pickle")
    return folder


def command(*arguments: str, environment: dict[str, str] | None = None) -> Result:
    """Runs `loraplex pull` in this process."""
    return CliRunner().invoke(app, ["pull", *arguments], env=environment or {})


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_fetched_whole_and_only_the_adapters_files(
    adapter: Path, tmp_path: Path
) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    done = pull(AdapterAddress.parse(f"file://{adapter}"), tmp_path / "into", "a")
    assert done.digest == Files.read(adapter).digest == Files.read(done.folder).digest
    assert tree(tmp_path / "into") == sorted(
        ["a", *(f"a/{name}" for name in [*NAMES, "chat_template.jinja"])]
    )
    again = pull(AdapterAddress.parse(f"file://{adapter}"), tmp_path / "into", "a")
    assert (done.changed, again.changed) == (True, False)


def test_other_files_take_the_place_only_if_that_is_wanted(adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", seed=1)
    first = pull(AdapterAddress.parse(f"file://{adapter}"), tmp_path / "into", "a")
    address = AdapterAddress.parse(f"file://{other}")
    with pytest.raises(PullFailed, match="has other files"):
        pull(address, tmp_path / "into", "a")
    assert Files.read(first.folder).digest == first.digest
    pull(address, tmp_path / "into", "a", replace=True)
    assert Files.read(first.folder).digest == Files.read(other).digest
    assert len(list((tmp_path / "into").iterdir())) == 1


def test_a_folder_that_cannot_be_replaced_is_still_there(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = AdapterAddress.parse(f"file://{adapter}")
    held = pull(address, tmp_path / "into", "a").folder
    (held / "mine.txt").write_text("mine")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == held and not (self / "mine.txt").exists():
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PullFailed, match="No space left"):
        pull(address, tmp_path / "into", "a", replace=True)
    assert (held / "mine.txt").read_text() == "mine"
    assert tree(tmp_path / "into") == sorted(["a", "a/mine.txt", *(f"a/{n}" for n in NAMES)])


@pytest.mark.parametrize("fault", ["missing", "no folder", "empty", "link", "large", "pickle"])
def test_what_is_no_plain_adapter_leaves_nothing(adapter: Path, tmp_path: Path, fault: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    match fault:
        case "missing":
            weights.unlink()
        case "no folder":
            shutil.rmtree(adapter)
        case "empty":
            weights.write_bytes(b"")
        case "link":
            weights.rename(tmp_path / "weights")
            weights.symlink_to(tmp_path / "weights")
        case "pickle":
            weights.write_bytes(b"\x80\x04" + b"x" * 100)
    limit = 100 if fault == "large" else fetching.MAX_BYTES
    with pytest.raises(PullFailed):
        pull(AdapterAddress.parse(f"file://{adapter}"), tmp_path / "into", "a", max_bytes=limit)
    assert not (tmp_path / "into").exists() or tree(tmp_path / "into") == []


def test_a_file_that_changes_while_it_is_fetched_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged = remote.LocalFolder.unchanged

    def change(self: remote.LocalFolder, file: remote.RemoteFile) -> bool:
        with (adapter / file.name).open("ab") as opened:
            opened.write(b"more")
        return unchanged(self, file)

    monkeypatch.setattr(remote.LocalFolder, "unchanged", change)
    with pytest.raises(PullFailed, match="changed while it was fetched"):
        pull(AdapterAddress.parse(f"file://{adapter}"), tmp_path / "into", "a")
    assert tree(tmp_path / "into") == []


def test_a_hub_is_read_at_one_commit(hub: fake_hub.Hub, adapter: Path, tmp_path: Path) -> None:
    hub.add(COMMIT, adapter)
    hub.add(OTHER, write_adapter(tmp_path / "sub", seed=1), "deep/er/")
    hub.refs.update({"main": COMMIT, "v2": OTHER})
    environment = {"HF_ENDPOINT": hub.url}
    for uri, folder, commit in (
        ("hf://org/name", adapter, COMMIT),
        ("hf://org/name@v2:deep/er", tmp_path / "sub", OTHER),
        (f"hf://org/name@{COMMIT}", adapter, COMMIT),
    ):
        into = tmp_path / f"into-{commit[0]}-{len(uri)}"
        done = command(uri, "--into", str(into), "--name", "x", "--json", environment=environment)
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["digest"] == Files.read(folder).digest
        assert found["source"].startswith(f"hf://org/name@{commit}")
        assert tree(into / "x") == NAMES
    assert not any("README" in path or "optimizer" in path for path in hub.asked)


def test_what_a_hub_refuses_or_lacks_is_one_line_without_secrets(
    hub: fake_hub.Hub, adapter: Path, tmp_path: Path
) -> None:
    hub.add(COMMIT, adapter)
    hub.refs["main"] = COMMIT
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_wrong"}
    uris = ["hf://org/none", "hf://org/name@none", "hf://org/name:none"]
    found = [command(uri, "--into", str(tmp_path / "x"), environment=environment) for uri in uris]
    hub.token = "hf_right"
    try:
        found.append(
            command("hf://org/name", "--into", str(tmp_path / "x"), environment=environment)
        )
        environment["HF_TOKEN"] = "hf_right"
        done = command("hf://org/name", "--into", str(tmp_path / "ok"), environment=environment)
        assert done.exit_code == 0, done.stderr
    finally:
        hub.token = ""
    for each in found:
        assert each.exit_code == 6
        assert each.stderr.count("\n") == 1
        assert "secret" not in each.stderr
        assert "hf_" not in each.stderr
        assert "Traceback" not in each.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("served", [b"short", b"\x00" * 100_000])
def test_bytes_other_than_those_listed_are_refused(
    hub: fake_hub.Hub, adapter: Path, tmp_path: Path, served: bytes
) -> None:
    hub.add(COMMIT, adapter)
    hub.refs["main"] = COMMIT
    hub.served["adapter_model.safetensors"] = served
    try:
        done = command(
            "hf://org/name", "--into", str(tmp_path / "x"), environment={"HF_ENDPOINT": hub.url}
        )
    finally:
        hub.served.clear()
    assert done.exit_code == 6
    assert "is not what was listed" in done.stderr
    assert tree(tmp_path / "x") == []


def test_a_bucket_is_read_below_a_prefix(s3: bucket.S3, adapter: Path, tmp_path: Path) -> None:
    s3.put(adapter, "team/a")
    s3.put(adapter, "team/a/nested")
    done = command("s3://adapters/team/a", "--into", str(tmp_path), environment=s3.environment)
    assert done.exit_code == 0, done.stderr
    assert tree(tmp_path / "a") == NAMES
    assert Files.read(tmp_path / "a").digest == Files.read(adapter).digest


def test_what_a_bucket_lacks_is_one_line_without_secrets(s3: bucket.S3, tmp_path: Path) -> None:
    for uri in ("s3://adapters/none", "s3://no-such-bucket/x"):
        done = command(uri, "--into", str(tmp_path / "x"), environment=s3.environment)
        assert done.exit_code == 6
        assert done.stderr.count("\n") == 1
        assert bucket.SECRET not in done.stderr
    away = {**s3.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    done = command("s3://adapters/a", "--into", str(tmp_path / "x"), environment=away)
    assert (done.exit_code, done.stderr.count("\n")) == (6, 1)


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(PullFailed, match=r"gcsfs is not installed: pip install 'loraplex\[pull\]'"):
        pull(AdapterAddress.parse("gs://bucket/a"), tmp_path / "into", "a")


def test_only_allowed_prefixes_and_plain_names_are_taken(adapter: Path, tmp_path: Path) -> None:
    uri, into = f"file://{adapter}", str(tmp_path / "into")
    assert command(uri, "--into", into, "--allow", "file:///none").exit_code == 2
    assert command(uri, "--into", into, "--allow", "nonsense").exit_code == 2
    assert command("nonsense", "--into", into).exit_code == 2
    for name in ("..", "a/b", ".hidden", "a\nb"):
        assert command(uri, "--into", into, "--name", name).exit_code == 2
    allowed = ("--allow", "s3://other", "--allow", f"file://{adapter.parent}")
    done = command(uri, "--into", into, *allowed)
    assert (done.exit_code, tree(Path(into))) == (
        0, ["Lora_A", *(f"Lora_A/{name}" for name in NAMES)],
    )  # fmt: skip
    environment = {"LORAPLEX_PULL_ALLOW": "s3://other file:///none"}
    assert command(uri, "--into", into, environment=environment).exit_code == 2
