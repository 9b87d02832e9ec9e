"""Which clients are skipped, which have failed, and when their environments are made again."""

from __future__ import annotations

import http.server
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import run
from clients.documents import Example
from clients.environments import CannotInstall, Environments, WrongPackages

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
GATEWAY = run.Gateway("127.0.0.1:1", "127.0.0.1:2")


def python(*packages: str) -> Example:
    return Example("one", "python", "import shipped; print(shipped)\n", packages, flagged=False)


def node(*packages: str) -> Example:
    return Example("one", "js", "console.log(1);\n", packages, flagged=False)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index of PyPI's and npm's kind, whose files are those of a folder."""
    folder = tmp_path / "index"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry(monkeypatch, tmp_path, server.server_port)
        yield folder
        server.shutdown()


def registry(monkeypatch: pytest.MonkeyPatch, caches: Path, port: int) -> None:
    """Makes both installers ask a port of this machine, once, and keep nothing."""
    address = f"http://127.0.0.1:{port}/"
    for name, value in {
        "PIP_INDEX_URL": address,
        "UV_HTTP_RETRIES": "0",
        "UV_CACHE_DIR": str(caches / "uv"),
        "npm_config_registry": address,
        "npm_config_fetch_retries": "0",
        "npm_config_cache": str(caches / "npm"),
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


def publish(index: Path, version: str) -> None:
    """Puts a wheel with the module `shipped` into an index."""
    folder = index / "shipped"
    folder.mkdir(exist_ok=True)
    name = f"shipped-{version}-py3-none-any.whl"
    info = f"shipped-{version}.dist-info"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("shipped.py", f"version = {version!r}\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: shipped\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/RECORD",
            "".join(f"{file},,\n" for file in [*wheel.namelist(), f"{info}/RECORD"]),
        )
    links = "".join(f'<a href="{file.name}">{file.name}</a>' for file in folder.glob("*.whl"))
    (folder / "index.html").write_text(links)


def made(example: Example, root: Path) -> Path:
    with Environments(root, [example]) as places:
        return places.of(example)


def test_an_environment_is_made_once_and_again_if_its_packages_change(
    index: Path, tmp_path: Path
) -> None:
    publish(index, "1.0")
    publish(index, "2.0")
    folder = made(python("shipped==1.0"), tmp_path / "work")
    (folder / "kept").touch()
    assert made(python("shipped==1.0"), tmp_path / "work") == folder
    assert (folder / "kept").exists()
    made(python("shipped==2.0"), tmp_path / "work")
    assert not (folder / "kept").exists()
    assert len(list(folder.glob("venv/lib/*/site-packages/shipped-2.0.dist-info"))) == 1


def test_an_environment_whose_making_was_interrupted_is_made_again(
    index: Path, tmp_path: Path
) -> None:
    publish(index, "1.0")
    folder = made(python("shipped==1.0"), tmp_path / "work")
    (folder / "made").unlink()
    (folder / "half").touch()
    made(python("shipped==1.0"), tmp_path / "work")
    assert not (folder / "half").exists()


@pytest.mark.parametrize(
    "example", [python("shipped==1.0"), pytest.param(node("shipped@1.0.0"), marks=needs_npm)]
)
def test_a_registry_that_does_not_answer_skips_the_client(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry(monkeypatch, tmp_path, 1)
    with pytest.raises(CannotInstall, match="exit status"):
        made(example, tmp_path / "work")


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    "example", [python("shipped==1.0"), pytest.param(node("shipped@1.0.0"), marks=needs_npm)]
)
def test_a_package_that_does_not_exist_is_a_failure(example: Example, tmp_path: Path) -> None:
    with pytest.raises(WrongPackages, match="shipped"):
        made(example, tmp_path / "work")


def test_an_installer_that_is_missing_skips_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotInstall, match="npm cannot be run"):
        made(node("shipped@1.0.0"), tmp_path / "work")


def test_the_end_of_the_program_stops_what_is_being_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        registry(monkeypatch, tmp_path, silent.server_port)  # connects, and is never answered
        with Environments(tmp_path / "work", [python("shipped==1.0")]) as places:
            pass
        with pytest.raises(CannotInstall):
            places.of(python("shipped==1.0"))


def test_an_environment_made_by_hand_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = Example("one", "sh", "true\n", (), flagged=True, variable="LORAPLEX_TEST_PYTHON")
    with pytest.raises(CannotInstall, match="LORAPLEX_TEST_PYTHON names no Python"):
        made(example, tmp_path)
    monkeypatch.setenv("LORAPLEX_TEST_PYTHON", sys.executable)
    folder = made(example, tmp_path)
    assert (folder / "venv" / "bin" / Path(sys.executable).name).samefile(sys.executable)


class Place:
    """Environments that have been made, or cannot be."""

    def __init__(self, outcome: Path | Exception) -> None:
        self._outcome = outcome

    def of(self, _: Example) -> Path:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def tried(code: str, outcome: Path | Exception, work: Path) -> run.Tried:
    found = run.Tried()
    example = Example("one", "sh", code, (), flagged=False)
    run.try_client(example, Place(outcome), GATEWAY, work, found)  # type: ignore[arg-type]
    return found


def test_an_installed_client_that_fails_or_prints_nothing_has_failed(tmp_path: Path) -> None:
    for name, code in {
        "exits": "echo no; exit 3",
        "silent": "true",
        "killed": "kill -9 $$",
    }.items():
        (tmp_path / name).mkdir()
        found = tried(code, tmp_path, tmp_path / name)
        assert (found.failed, found.skipped, found.exit_code) == (["one"], {}, 1), name


def test_what_passes_and_what_is_skipped_fail_nothing_unless_nothing_passed(tmp_path: Path) -> None:
    found = tried("echo fine", tmp_path, tmp_path)
    assert (found.passed, found.failed, found.exit_code) == (1, [], 0)
    silent = CannotInstall("exit status 2 of uv: error: x\n  Caused by: no answer")
    alone = tried("", silent, tmp_path)
    assert (alone.skipped, alone.exit_code) == ({"one": "Caused by: no answer"}, 1)
    found.skipped |= alone.skipped
    assert found.exit_code == 0
    wrong = tried("", WrongPackages("no such package"), tmp_path)
    assert (wrong.failed, wrong.exit_code) == (["one"], 1)
