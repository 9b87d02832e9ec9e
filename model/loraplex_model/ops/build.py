"""Compiles the CPU kernels, once per instruction set, and finds earlier builds.

    python -m loraplex_model.ops.build [--all] [--into DIR]

A build is in `<directory>/<isa>-<digest of the sources>/`, so that changed sources never use an old
library and several versions can share a directory. `LORAPLEX_KERNELS_DIR` names a directory that is
searched first; an image without a compiler has its kernels there. A build is used only if its
library has the SHA-256 that was written beside it; otherwise it is built again, with a warning.
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
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from loraplex_model.base.durable import (
    flush,
    locked,
    make_directory,
    read_regular,
    write_atomically,
)
from loraplex_model.base.refusal import Reason, Refusal

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[1] / "decoder" / "cpu"
LIBRARY = "loraplex_cpu.so"
DIGEST = LIBRARY + ".sha256"
"""Name of the file beside a library with the SHA-256 of its bytes, in hex."""

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma")

ISAS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
"""Compiler flags by instruction set, fastest first: "-m" and a feature that it needs."""

_FEATURES = {"avx512bf16": "avx512_bf16", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
"""Features by their names in Linux, where the compiler has others."""


class Kernels(ctypes.CDLL):
    """The compiled library; `isa` is the instruction set that it was compiled for."""

    isa: str = ""


class KernelsUnavailable(Exception):
    """There are no compiled kernels and they cannot be compiled; the message says what to do."""


@cache
def _processor() -> dict[str, str]:
    """What Linux says of the first processor, by field; empty if it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_flags() -> frozenset[str]:
    """The processor's features, by their names in Linux; empty if they cannot be read."""
    return frozenset(_processor().get("flags", "").split())


@cache
def _may_use_tiles() -> bool:
    """Whether Linux lets this process use AMX, for which each process must ask once."""
    permission, tile_data = 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(158, permission, tile_data) == 0)  # arch_prctl


def supported_isas() -> list[str]:
    """Instruction sets that this processor can run, fastest first."""
    flags = cpu_flags()
    supported = [
        isa
        for isa, options in ISAS.items()
        if flags.issuperset(_FEATURES.get(name := o.removeprefix("-m"), name) for o in options)
        and (isa != "amx" or _may_use_tiles())
    ]
    if "avx512bf16" in supported and _processor().get("vendor_id") == "GenuineIntel":
        # Intel's processors multiply bfloat16 at half the rate of float32 unless they use AMX.
        at = supported.index("avx512bf16")
        supported[at : at + 2] = supported[at + 1], supported[at]
    return supported


def chosen_isa() -> str:
    """The instruction set of the kernels: that of `LORAPLEX_ISA`; if it is unset, the fastest one.

    Raises `Refusal` (CONFIG_INVALID) if the variable names none that this processor can run.
    """
    supported = supported_isas()
    asked = os.environ.get("LORAPLEX_ISA") or supported[0]
    if asked not in supported:
        what = "this processor cannot run" if asked in ISAS else f"is not one of {', '.join(ISAS)}"
        raise Refusal(
            Reason.CONFIG_INVALID,
            f"LORAPLEX_ISA is {asked!r}, which {what}; set it to one that this processor can run "
            f"({', '.join(supported)}), or unset it for the fastest of them",
        )
    return asked


@cache
def source_digest() -> str:
    """Twelve hex digits over the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in {".h", ".cpp"}:
            digest.update(
                path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
            )
    return digest.hexdigest()[:12]


def default_directory() -> Path:
    """Directory of builds: `$XDG_CACHE_HOME/loraplex/kernels`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "loraplex" / "kernels"


def find(isa: str, flags: Sequence[str] = (), directory: Path | None = None) -> Path | None:
    """A whole build in `LORAPLEX_KERNELS_DIR` or in `directory`, or None.

    Logs a warning for every damaged build that is skipped.
    """
    for path in builds(isa, flags, directory):
        if is_whole(path):
            return path
        log.warning("the kernels at %s are damaged or incomplete, so they are not used", path)
    return None


def builds(isa: str, flags: Sequence[str] = (), directory: Path | None = None) -> list[Path]:
    """Libraries in `LORAPLEX_KERNELS_DIR` and in `directory`, whether they are whole or not."""
    shipped = os.environ.get("LORAPLEX_KERNELS_DIR")
    places = [Path(shipped)] if shipped else []
    folders = (place / _name(isa, flags) for place in (*places, directory or default_directory()))
    return [folder / LIBRARY for folder in folders if folder.exists()]


def is_built(isa: str, directory: Path | None = None) -> bool:
    """Whether kernels for `isa` can be used without compiling them."""
    return (isa, ()) in _loaded or any(map(is_whole, builds(isa, directory=directory)))


def is_whole(path: Path) -> bool:
    """Whether a library has the digest that was written beside it when it was built."""
    recorded, actual = _recorded(path), _file_digest(path)
    return bool(actual) and recorded == actual


def compile_kernels(
    isa: str, into: Path | None = None, flags: Sequence[str] = (), *, instead_of: str = ""
) -> Path:
    """Compiles for `isa` with torch's extension loader; returns the library's path.

    A build has a directory of its own, is flushed to disk with its digest and moved into place by a
    rename, so neither a killed build nor a power cut disturbs a later one. One of several processes
    compiles while the others wait. A whole build is returned at once, unless it has the digest
    `instead_of`, which does not load. Raises `KernelsUnavailable`.
    """
    target = (into or default_directory()) / _name(isa, flags)
    try:
        make_directory(target.parent)
        with locked(target.parent / f".{target.name}.lock", mode=0o666):
            library = target / LIBRARY
            if not is_whole(library) or _recorded(library) == instead_of:
                _compile(isa, target, flags)
            return library
    except (RuntimeError, OSError) as error:
        raise KernelsUnavailable(f"compiling the CPU kernels failed: {error}") from error


def _compile(isa: str, target: Path, flags: Sequence[str]) -> None:
    """Compiles into `target`, in the place of a damaged build. Called with the build's lock."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise KernelsUnavailable("no C++ compiler found; install g++ (Debian: apt-get install g++)")
    from torch.utils import cpp_extension

    prefix = f".build-{target.name}-"
    for abandoned in target.parent.glob(prefix + "*"):  # by a dead process, since we hold the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        log.info("compiling the CPU kernels for %s (once)", isa)
        # The loader loads what it has compiled, and adds a suffix to a name that it knows.
        name = f"loraplex_cpu_{uuid.uuid4().hex}"
        cpp_extension.load(
            name=name,
            sources=[str(SOURCES / "library.cpp")],
            extra_cflags=["-O3", "-fopenmp", "-Wno-psabi", *ISAS[isa], *flags],
            extra_ldflags=["-fopenmp", *flags],
            build_directory=str(scratch),
            is_python_module=False,
        )
        finished = scratch / "finished"
        finished.mkdir(mode=0o755)
        library = finished / LIBRARY
        shutil.copy2(scratch / f"{name}.so", library)
        flush(library)
        write_atomically(finished / DIGEST, _file_digest(library).encode())
        flush(finished)
        if target.exists():
            target.rename(scratch / "damaged")
        finished.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _file_digest(path: Path) -> str:
    """SHA-256 of a file in hex; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _recorded(path: Path) -> str:
    """The digest beside a library; empty if there is none."""
    try:
        return read_regular(path.parent / DIGEST).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def load(
    isa: str | None = None, flags: tuple[str, ...] = (), directory: Path | None = None
) -> Kernels:
    """The kernels for `isa` (default: `chosen_isa`), compiled if need be.

    `directory` holds the builds. A process loads one library per instruction set, from the
    directory of the first call. A build that is damaged or does not load is built again, once.

    Raises:
        KernelsUnavailable: they cannot be compiled or loaded.
        Refusal: `LORAPLEX_ISA` is wrong, and `isa` is not given.
    """
    isa = isa or chosen_isa()
    if isa not in supported_isas():
        raise KernelsUnavailable(f"this processor cannot run {isa}; it runs {supported_isas()}")
    if (isa, flags) not in _loaded:
        path = find(isa, flags, directory)
        library = _open(path or compile_kernels(isa, directory, flags), retry=path is not None)
        if library is None:
            assert path is not None
            built = compile_kernels(isa, directory, flags, instead_of=_recorded(path))
            library = _open(built)
        assert library is not None
        library.isa = isa
        _loaded[isa, flags] = library
    return _loaded[isa, flags]


def _open(path: Path, *, retry: bool = False) -> Kernels | None:
    """Loads a library. If it does not load: None and a warning with `retry`, else an exception."""
    import torch  # noqa: F401 - the library is linked to torch's, which this loads

    try:
        return Kernels(str(path))
    except OSError as error:
        if not retry:
            raise KernelsUnavailable(f"the kernels at {path} do not load: {error}") from error
        log.warning("the kernels at %s do not load, so they are built again: %s", path, error)
        return None


_loaded: dict[tuple[str, tuple[str, ...]], Kernels] = {}


def _name(isa: str, flags: Sequence[str]) -> str:
    return "-".join([isa, *(re.sub(r"\W", "", flag) for flag in flags), source_digest()])


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
