"""What the image installs is fixed to the byte, and the files that say so agree with each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from deploy.dashboard import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HASHES, TORCH = "requirements.hashes", "requirements.torch.hashes"
EXTRAS = ("server", "postgres")


def pinned(name: str) -> dict[str, str]:
    """The versions that a file of requirements fixes, by package."""
    lines = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\\n]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in lines}


def hashes(name: str) -> dict[str, list[str]]:
    """The hashes that a file of requirements lists, by package."""
    blocks = re.split(r"\n(?=\S)", (ROOT / name).read_text())
    return {
        canonicalize_name(block.partition("==")[0]): re.findall(r"--hash=sha256:(\w+)", block)
        for block in blocks
        if "==" in block and not block.startswith("#")
    }


def direct() -> list[str]:
    """What pyproject.toml names for the server."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(one for extra in EXTRAS for one in extras[extra])]


def needed() -> set[str]:
    """The packages that the installed server needs, and those that they need."""
    found: set[str] = set()
    waiting = [("", "")]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            requires = metadata.requires(name) or () if name else direct()
        except metadata.PackageNotFoundError:
            continue
        for text in requires:
            one = Requirement(text)
            if one.marker is not None and not one.marker.evaluate({"extra": extra}):
                continue
            child = canonicalize_name(one.name)
            found.add(child)
            for wanted in ("", *one.extras):
                if (child, wanted) not in seen:
                    seen.add((child, wanted))
                    waiting.append((child, wanted))
    return found


def test_every_package_has_hashes_of_the_locked_version() -> None:
    lock = pinned("requirements.lock")
    for name in (HASHES, TORCH):
        versions, listed = pinned(name), hashes(name)
        assert versions.keys() == listed.keys()
        for package, found in listed.items():
            assert found, package
            assert all(re.fullmatch("[0-9a-f]{64}", one) for one in found), package
            assert len(set(found)) == len(found), package
            # What is not installed on a CPU is in no lock: the libraries of CUDA.
            assert lock.get(package, versions[package]) == versions[package], package


def test_nothing_that_the_server_needs_is_without_a_hash() -> None:
    listed = hashes(HASHES).keys() | hashes(TORCH).keys()
    assert needed() - listed == set()
    assert len(needed()) > 30


def test_torch_is_apart_because_another_index_has_other_files() -> None:
    assert "torch" in hashes(TORCH)
    assert not hashes(HASHES).keys() & hashes(TORCH).keys()
    assert all(re.fullmatch("torch|triton|nvidia-.*|cuda-.*", package) for package in hashes(TORCH))


def test_the_image_installs_by_hash_only() -> None:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    installs = re.findall(r"pip install ([^;&\n]+)", text)
    assert len(installs) == 4
    for options in installs:
        by_hash = "--require-hashes --no-deps" in options
        own = options.strip() == "--no-deps ."
        other_torch = options.split()[-1] == "torch" and "--no-deps" in options
        assert by_hash or own or other_torch, options
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{HASHES}", f"!{TORCH}"} <= set(ignored)


def test_no_file_names_a_host() -> None:
    for name in (HASHES, TORCH, "requirements.lock"):
        assert "://" not in (ROOT / name).read_text()


@pytest.fixture
def no_service(tmp_path: Path) -> Path:
    """A Python whose pip_audit reaches nobody."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "pip_audit.py").write_text(
        "import sys\nprint('no connection', file=sys.stderr)\nsys.exit(1)\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_an_audit_that_reaches_no_service_is_no_success(no_service: Path) -> None:
    command = [ROOT / "scripts" / "audit", no_service]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no advisory service could be reached" in done.stderr


def test_an_audit_names_what_it_found(tmp_path: Path, no_service: Path) -> None:
    report = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]},
            {"name": "b", "version": "1", "vulns": []},
        ]
    }
    (tmp_path / "modules" / "pip_audit.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        f"place = Path(sys.argv[sys.argv.index('--output') + 1])\n"
        f"place.write_text({json.dumps(report)!r})\n"
        "sys.exit(1)\n"
    )
    command = [ROOT / "scripts" / "audit", no_service]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "a 1: CVE-1, fixed in 2" in done.stdout


@pytest.mark.slow
def test_the_bills_of_materials_are_valid_complete_and_always_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        command = [ROOT / "scripts" / "sbom", sys.executable, tmp_path / name]
        subprocess.run(command, check=True, cwd=ROOT)
    for kind in ("image", "environment"):
        one, two = (tmp_path / name / f"sbom-{kind}.json" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        bill = json.loads(one.read_text())
        assert "timestamp" not in bill.get("metadata", {})
        parts = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
        if kind == "image":
            assert parts == pinned(HASHES) | pinned(TORCH)
        else:
            assert parts["pytest"] == metadata.version("pytest")
