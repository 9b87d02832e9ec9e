"""The console's files are what they say, are complete, and lead nowhere else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "gateway" / "loraplex_gateway" / "console" / "static"
OWN = [path for path in STATIC.rglob("*") if path.is_file() and path.parent.name != "vendor"]


def test_vendored_files_are_those_of_the_manifest() -> None:
    vendor = STATIC / "vendor"
    manifest = json.loads((vendor / "vendor.json").read_text("utf-8"))
    listed = {"vendor.json"}
    for package in manifest["packages"]:
        assert package["integrity"].startswith("sha512-")
        assert any(name.endswith(".LICENSE") for name in package["files"]), package["name"]
        for name, file in package["files"].items():
            found = hashlib.sha256((vendor / name).read_bytes()).hexdigest()
            assert found == file["sha256"], name
            listed.add(name)
    assert {path.name for path in vendor.iterdir()} == listed


def test_the_page_names_no_other_origin_and_no_inline_code() -> None:
    for path in OWN:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://", text), path
        assert "innerHTML" not in text, path
    markup = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\son\w+=|\sstyle=", markup)
    assert not re.search(r"<script(?![^>]*\ssrc=)", markup)


def test_no_script_makes_markup_or_code_of_a_text() -> None:
    for path in OWN:
        if path.suffix not in (".js", ".mjs", ".html"):
            continue
        found = re.findall(
            r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|dangerouslySetInnerHTML|srcdoc|"
            r"eval\(|createContextualFragment|DOMParser|document\.write|new Function|javascript:)",
            path.read_text("utf-8"),
        )
        assert not found, path


def test_every_import_and_link_names_a_file() -> None:
    for path in OWN:
        text = path.read_text("utf-8")
        for name in re.findall(r'from "(\.[^"]+)"', text):
            assert (path.parent / name).is_file(), f"{path.name} imports {name}"
    markup = (STATIC / "index.html").read_text("utf-8")
    for name in re.findall(r'(?:href|src)="([^"]+)"', markup):
        assert (STATIC / name).is_file(), name
    styles = set(re.findall(r'href="(styles/[^"]+)"', markup))
    assert styles == {f"styles/{path.name}" for path in (STATIC / "styles").iterdir()}


def test_files_are_short_and_folders_small() -> None:
    for path in OWN:
        assert len(path.read_text("utf-8").splitlines()) <= 400, path
    for folder in {path.parent for path in OWN}:
        assert len(list(folder.iterdir())) <= 16, folder


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_scripts_are_valid() -> None:
    scripts = [str(path) for path in OWN if path.suffix == ".js"]
    check = "for (const file of process.argv.slice(1)) new (require('vm').SourceTextModule)("
    check += "require('fs').readFileSync(file, 'utf8'), {identifier: file})"
    command = ["node", "--experimental-vm-modules", "--no-warnings", "-e", check, *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
