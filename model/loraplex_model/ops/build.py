"""Compiles the CPU kernels, once per instruction set, and finds earlier builds.

    python -m loraplex_model.ops.build [--all] [--into DIR]

A build is in `<directory>/<isa>-<digest of the sources>/`, so that changed sources never use an old
library and several versions can share a directory. `LORAPLEX_KERNELS_DIR` names a directory that is
searched first; an image without a compiler has its kernels there.
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
"""Compiler flags by instruction set, fastest first: "-m" and a feature that it needs."""


class Kernels(ctypes.CDLL):
    """The compiled library; `isa` is the instruction set that it was compiled for."""

    isa: str = ""


class KernelsUnavailable(Exception):
    """There are no compiled kernels and they cannot be compiled; the message says what to do."""


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's features, by their names in Linux; empty if they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def supported_isas() -> list[str]:
    """Instruction sets that this processor can run, fastest first."""
    return [
        isa
        for isa, flags in ISAS.items()
        if cpu_flags().issuperset(flag.removeprefix("-m") for flag in flags)
    ]


@cache
def source_digest() -> str:
    """Twelve hex digits over the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".h", ".cpp"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def default_directory() -> Path:
    """Directory of builds: `$XDG_CACHE_HOME/loraplex/kernels`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "loraplex" / "kernels"


def find(isa: str, flags: Sequence[str] = (), directory: Path | None = None) -> Path | None:
    """A finished build in `LORAPLEX_KERNELS_DIR` or in `directory`, or None."""
    shipped = os.environ.get("LORAPLEX_KERNELS_DIR")
    places = [Path(shipped)] if shipped else []
    paths = (
        place / _name(isa, flags) / LIBRARY for place in (*places, directory or default_directory())
    )
    return next((path for path in paths if path.is_file()), None)


def compile_kernels(isa: str, into: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """Compiles for `isa` with torch's extension loader; returns the library's path.

    A build has a directory of its own and is moved into place by one rename, so a killed build
    never disturbs a later one. Raises `KernelsUnavailable`.
    """
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise KernelsUnavailable("no C++ compiler found; install g++ (Debian: apt-get install g++)")
    from torch.utils import cpp_extension

    target = (into or default_directory()) / _name(isa, flags)
    # The loader adds a suffix to a name that it has built before in this process.
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

    `LORAPLEX_ISA` overrides the default. `directory` holds the builds. A process loads one library
    per instruction set, from the directory of the first call. Raises `KernelsUnavailable`.
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
    """The command line, which compiles the kernels now, for instance while an image is built."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument(
        "--all",
        action="store_true",
        help="compile for every instruction set, not only for this machine",
    )
    parser.add_argument("--into", type=Path, help="directory of the builds")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for isa in ISAS if arguments.all else supported_isas()[:1]:
        print(compile_kernels(isa, arguments.into))


if __name__ == "__main__":
    main()
