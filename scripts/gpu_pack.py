#!/usr/bin/env python3
"""Gathers in .gpu/ what the check on a GPU needs on a machine without network: make gpu-pack

    python scripts/gpu_pack.py [--python 3.12] [--cuda 130]

    .gpu/site/bitsandbytes   its Python code, and its libraries for one CUDA release and for the CPU
    .gpu/site/msgspec        for that machine's Python
    .gpu/ref.npz             tiny models with Hugging Face's logits in float64

The folder travels with the working tree; torch, Triton, transformers and PEFT must be there. On the
machine: python3 bench/gpu_check.py --out DIRECTORY. The last line of output is one JSON object.
Exit code 1 if folder and tree are larger than 64 MiB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".gpu"
MOST_BYTES = 64 << 20
WHEELS = ("bitsandbytes", "msgspec")


def pinned(package: str) -> str:
    """A package in the version of requirements.lock, as pip names it."""
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line
    raise SystemExit(f"{package} is not in requirements.lock")


def download(packages: list[str], python: str, into: Path) -> list[Path]:
    """Wheels of packages, without what they depend on, for Linux and a release of Python."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(into)]
    command += ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, *packages], check=True)
    return sorted(into.glob("*.whl"))


def unpack(wheel: Path, into: Path, is_wanted: Callable[[str], bool]) -> None:
    """Extracts the wanted files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if is_wanted(name):
                archive.extract(name, into)


def wanted_files(cuda: str) -> Callable[[str], bool]:
    """Whether a file is wanted: no library of bitsandbytes for another CUDA release."""
    libraries = (f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so")

    def is_wanted(name: str) -> bool:
        last = name.rpartition("/")[2]
        return not last.startswith("libbitsandbytes_") or last in libraries

    return is_wanted


def write_references() -> None:
    """Writes .gpu/ref.npz, in a process that sees this tree's packages."""
    code = "import numpy, sys; from gpu import references; " + (
        "numpy.savez_compressed(sys.argv[1], **references.make())"
    )
    paths = [ROOT / "bench", *(ROOT / name for name in ("model", "adapters"))]
    setup = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}; "
    command = [sys.executable, "-c", setup + code, str(FOLDER / "ref.npz")]
    subprocess.run(command, check=True, cwd=ROOT)


def tree_bytes() -> int:
    """Bytes of the working tree as it travels: tracked files, and new ones that git keeps."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Gather what the check on a GPU needs.")
    parser.add_argument("--python", default="3.12", help="Python of the machine with the GPU")
    parser.add_argument("--cuda", default="130", help="CUDA release of its torch, such as 130")
    args = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    site = FOLDER / "site"
    site.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        for wheel in download([pinned(name) for name in WHEELS], args.python, Path(folder)):
            unpack(wheel, site, wanted_files(args.cuda))
    library = site / "bitsandbytes" / f"libbitsandbytes_cuda{args.cuda}.so"
    if not library.exists():
        raise SystemExit(f"bitsandbytes has no library for CUDA {args.cuda}")
    write_references()
    packed = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    total = packed + tree_bytes()
    figures = {
        "packed_bytes": packed,
        "total_bytes": total,
        "limit_bytes": MOST_BYTES,
        "python": args.python,
        "cuda": args.cuda,
    }
    print(json.dumps(figures))
    return int(total > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
