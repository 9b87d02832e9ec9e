"""scripts/fetch-chromium, with an apt-get and a dpkg whose packages are made here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch-chromium"
TOOLS = (
    *("awk", "bash", "cat", "chmod", "cp", "dirname", "find", "id", "mkdir", "mktemp", "mv"),
    *("readlink", "rm", "sh", "sort", "tail", "tar", "tr", "xargs"),
)
APT = """#!/bin/sh
case "$1" in
install)
    for file in "$PACKAGES"/*; do
        name=${file##*/}
        [ ! -e "$file" ] || echo "Inst ${name%.deb} (1.0 Debian)"
    done
    ;;
download)
    for name; do [ ! -e "$PACKAGES/$name.deb" ] || cp "$PACKAGES/$name.deb" .; done
    echo "E: Failed to fetch" >&2
    exit "$CODE"
    ;;
*) exit 1 ;;
esac
"""
DPKG = """#!/bin/sh
mkdir -p "$3" && tar xf "$2" -C "$3"
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with the programs that the script may use, and no Chromium."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    return folder


def put(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)


def pack(packages: Path, name: str, files: Mapping[str, str]) -> None:
    """A package, for the dpkg of these tests."""
    packages.mkdir(exist_ok=True)
    with tarfile.open(packages / f"{name}.deb", "w") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.mode, entry.size = 0o755, len(text)
            archive.addfile(entry, BytesIO(text.encode()))


def fetch(tmp_path: Path, programs: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the script in a checkout of its own."""
    script = tmp_path / "checkout" / "scripts" / SCRIPT.name
    script.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(SCRIPT, script)
    variables = {"PATH": str(programs), "PACKAGES": str(tmp_path / "packages"), "CODE": str(code)}
    return subprocess.run([script], env=variables, capture_output=True, text=True, check=False)


def test_an_installed_chromium_is_left_alone(tmp_path: Path, programs: Path) -> None:
    put(programs, "chromium", "#!/bin/sh\n")
    assert fetch(tmp_path, programs).returncode == 0
    assert not (tmp_path / "checkout" / "var").exists()


def test_packages_are_unpacked_and_the_program_finds_their_libraries(
    tmp_path: Path, programs: Path
) -> None:
    put(programs, "apt-get", APT)
    put(programs, "dpkg", DPKG)
    program = '#!/bin/sh\necho "$LD_LIBRARY_PATH" "$@"\n'
    pack(tmp_path / "packages", "chromium", {"usr/lib/chromium/chromium": program})
    pack(tmp_path / "packages", "libone", {"usr/lib/machine/inner/libone.so.1": ""})
    done = fetch(tmp_path, programs)
    assert done.returncode == 0, done.stderr
    tools = tmp_path / "checkout" / "var" / "tools"
    said = subprocess.check_output([tools / "bin" / "chromium", "--one"], text=True)
    assert said == f"{tools}/chromium/usr/lib/machine/inner: --one\n"
    shutil.rmtree(tmp_path / "packages")
    assert fetch(tmp_path, programs).returncode == 0, "it is fetched once"


@pytest.mark.parametrize("missing", ["apt-get", "packages", "download", "library"])
def test_what_cannot_be_fetched_or_started_is_an_error_that_says_what_to_do(
    tmp_path: Path, programs: Path, missing: str
) -> None:
    if missing != "apt-get":
        put(programs, "apt-get", APT)
        put(programs, "dpkg", DPKG)
    if missing != "packages":
        program = "#!/bin/sh\necho cannot open libone.so.1 >&2\nexit 127\n"
        pack(tmp_path / "packages", "chromium", {"usr/lib/chromium/chromium": program})
    done = fetch(tmp_path, programs, code=100 if missing == "download" else 0)
    assert done.returncode == 1
    assert "apt-get install chromium" in done.stderr
    assert "CHROMIUM=" in done.stderr
    why = {"apt-get": "no apt-get", "download": "Failed to fetch", "library": "libone.so.1"}
    assert why.get(missing, "could not fetch") in done.stderr
    assert not (tmp_path / "checkout" / "var" / "tools" / "bin" / "chromium").exists()


def test_a_machine_without_node_is_told_what_to_do_and_may_be_passed_over() -> None:
    command = [sys.executable, str(SCRIPT.parent / "console_tests.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: node is not installed; on Debian: apt-get install nodejs npm\n"
    command.append("--or-skip")
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"})
    found = json.loads(done.stdout)
    assert (done.returncode, found["passed"]) == (0, 0)
    assert found["skipped"].startswith("node is not installed")
