"""Compiles the CPU kernels, once for each instruction set, and finds them again.

    python -m loraplex_model.ops.build [--all] [--into DIR]

A build lies in `<directory>/<isa>-<digest of the sources>/`, so that a changed source never meets
an old library and several versions can share a directory. `LORAPLEX_KERNELS_DIR` names a directory
that is searched first; an image without a compiler ships its kernels there.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[1] / "decoder" / "cpu"
LIBRARY = "loraplex_cpu.so"

ISAS: dict[str, tuple[str, ...]] = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
"""Instruction sets, best first, and the compiler's flags for each."""

NEEDED = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"},
    "avx2": {"avx2", "fma"},
    "portable": set[str](),
}


class Kernels(ctypes.CDLL):
    """The compiled library, and the instruction set it was compiled for."""

    isa: str = ""


class KernelsUnavailable(Exception):
    """No compiled kernels and no way to compile them; the message says why and what to do."""


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's features, as Linux names them; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def supported_isas() -> list[str]:
    """What this processor can run, best first."""
    return [isa for isa in ISAS if NEEDED[isa] <= cpu_flags()]


@cache
def source_digest() -> str:
    """Twelve hex digits over the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".h", ".cpp"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def default_directory() -> Path:
    """Where builds are kept: `$XDG_CACHE_HOME/loraplex/kernels`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "loraplex" / "kernels"


def find(isa: str, flags: Sequence[str] = (), directory: Path | None = None) -> Path | None:
    """A finished build in `LORAPLEX_KERNELS_DIR` or in `directory`, or None."""
    shipped = os.environ.get("LORAPLEX_KERNELS_DIR")
    for place in (Path(shipped) if shipped else None, directory or default_directory()):
        if place is None:
            continue
        path = place / _name(isa, flags) / LIBRARY
        if path.is_file():
            return path
    return None


def compile_kernels(isa: str, into: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """Compiles for `isa` with torch's extension loader; returns the library's path.

    The build happens in a directory of its own and is moved into place whole, so a killed build
    leaves nothing behind that a later one would trip over. Raises `KernelsUnavailable`.
    """
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise KernelsUnavailable("no C++ compiler found; install g++ (Debian: apt-get install g++)")
    from torch.utils import cpp_extension

    target = (into or default_directory()) / _name(isa, flags)
    # The loader counts its builds by name within a process: one name each, or it adds suffixes.
    name = "loraplex_cpu_" + re.sub(r"\W", "_", target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=target.parent))
    try:
        log.info("compiling the CPU kernels for %s (once)", isa)
        cpp_extension.load(
            name=name,
            sources=[str(SOURCES / "library.cpp")],
            extra_cflags=["-O3", "-fopenmp", "-Wno-psabi", *ISAS[isa], *flags],
            extra_ldflags=["-fopenmp"],
            build_directory=str(scratch),
            is_python_module=False,
        )
        finished = Path(tempfile.mkdtemp(prefix=".done-", dir=target.parent))
        shutil.copy2(scratch / f"{name}.so", finished / LIBRARY)
        finished.chmod(0o755)
        try:
            finished.rename(target)
        except OSError:  # another process finished the same build first
            shutil.rmtree(finished)
    except (RuntimeError, OSError) as error:
        raise KernelsUnavailable(f"compiling the CPU kernels failed: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target / LIBRARY


def load(
    isa: str | None = None, flags: tuple[str, ...] = (), directory: Path | None = None
) -> Kernels:
    """The kernels for `isa` (default: the best this processor runs), compiled if need be.

    `LORAPLEX_ISA` overrides the default. `directory` keeps the builds. A process loads one library
    for an instruction set: whoever asks first says from where. Raises `KernelsUnavailable`.
    """
    isa = isa or os.environ.get("LORAPLEX_ISA") or supported_isas()[0]
    if isa not in supported_isas():
        raise KernelsUnavailable(f"this processor cannot run {isa}; it runs {supported_isas()}")
    if (isa, flags) not in _loaded:
        path = find(isa, flags, directory) or compile_kernels(isa, directory, flags)
        try:
            library = Kernels(str(path))
        except OSError as error:
            raise KernelsUnavailable(f"the kernels at {path} do not load: {error}") from error
        library.isa = isa
        _loaded[isa, flags] = library
    return _loaded[isa, flags]


_loaded: dict[tuple[str, tuple[str, ...]], Kernels] = {}


def _name(isa: str, flags: Sequence[str]) -> str:
    return "-".join([isa, *(flag.strip("-").replace("=", "") for flag in flags), source_digest()])


def main() -> None:
    """Command line: compile now, for instance while an image is built."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("--all", action="store_true", help="not only for this machine")
    parser.add_argument("--into", type=Path, help="directory to build into")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for isa in ISAS if arguments.all else supported_isas()[:1]:
        print(compile_kernels(isa, arguments.into))


if __name__ == "__main__":
    main()
