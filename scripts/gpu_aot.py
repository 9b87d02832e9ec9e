#!/usr/bin/env python3
"""Compiles every Triton kernel for several kinds of GPU, without one: make gpu-aot

    python scripts/gpu_aot.py --older DIRECTORY [--check]

Every configuration that `compilations()` of a module in `loraplex_model.decoder.cuda.kernels` names
is compiled for the targets below, by the Triton of this Python and by the older release in
DIRECTORY. The registers of a thread, what it spills, the shared memory of a block and the matrix
instructions are written to bench/results/gpu-aot.md; `--check` compares them with that file
instead. The figures say what the compilers made of the kernels, and nothing of their speed.

A configuration fails if it does not compile, if a kernel that runs in every layer spills registers
to memory, or if a block needs more shared memory than the target has. The last line of output is
one JSON object. Exit code 1 if a configuration fails, or if the comparison finds a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu-aot.md"

SHARED_KB = {80: 163, 90: 227, 120: 99}
"""Shared memory that one block may use, in KiB, by compute capability: A100, H100 and H200, and
GeForce RTX 50 (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one configuration takes on one target.

    Attributes:
        name: the configuration's name.
        is_hot: it runs in every layer of a step.
        capability: compute capability times ten.
        registers: of a thread.
        spilled: bytes that a thread stores to memory for want of registers.
        stack: bytes of a thread's stack frame.
        shared: bytes of a block's shared memory.
        product: the matrix instruction it uses: "wgmma", "mma", or "" if none.
        error: why it did not compile; "" if it did.
    """

    name: str
    is_hot: bool
    capability: int
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    product: str = ""
    error: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with it; "" if nothing is."""
        if self.error:
            return self.error
        if self.is_hot and self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_KB[self.capability] * 1024:
            return f"needs {self.shared} bytes of shared memory"
        return ""


def compilations() -> Iterator[Any]:
    """The configurations of all kernels, in the order of their modules."""
    kernels = importlib.import_module("loraplex_model.decoder.cuda.kernels")
    seen: set[str] = set()
    for info in sorted(pkgutil.iter_modules(kernels.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for compilation in getattr(module, "compilations", list)():
            assert compilation.name not in seen, f"two configurations named {compilation.name}"
            seen.add(compilation.name)
            yield compilation


def compile_one(compilation: Any, capability: int) -> Usage:
    """Compiles a configuration for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = compilation.kernel, dict(compilation.constants)
    types = {**compilation.signature, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    # Tensors begin at multiples of 16 bytes, which a launch finds out by itself.
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            built = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options=options
            )
    except Exception as error:
        lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        return Usage(compilation.name, compilation.is_hot, capability, error=" ".join(lines)[:400])
    ptx = built.asm["ptx"]
    return Usage(
        compilation.name,
        compilation.is_hot,
        capability,
        shared=int(built.metadata.shared),
        product="wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else "",
        **of_log(log.getvalue()),
    )


def of_log(log: str) -> dict[str, int]:
    """Registers, spilled bytes and stack from what `ptxas -v` prints."""
    found = {}
    for line in log.splitlines():
        words = line.replace(",", " ").split()
        for i, word in enumerate(words):
            if word == "registers":
                found["registers"] = int(words[i - 1])
            elif words[i : i + 3] == ["bytes", "stack", "frame"]:
                found["stack"] = int(words[i - 1])
            elif words[i : i + 3] == ["bytes", "spill", "stores"]:
                found["spilled"] = int(words[i - 1])
    assert found.keys() == {"registers", "stack", "spilled"}, f"ptxas printed something else: {log}"
    return found


def compile_all() -> None:
    """The part of one release of Triton: prints its version, then one line for each `Usage`."""
    import triton

    print(json.dumps(triton.__version__), flush=True)
    for compilation in compilations():
        for capability in SHARED_KB:
            print(json.dumps(asdict(compile_one(compilation, capability))), flush=True)


def by_release(directory: Path | None) -> tuple[str, list[Usage]]:
    """Version and results of the Triton in `directory`, or of the one that this Python has."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": cache,
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("TRITON_INTERPRET", None)
        if directory is not None:
            paths = [str(directory), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, __file__, "--worker"]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    version, *lines = done.stdout.splitlines()
    return json.loads(version), [Usage(**json.loads(line)) for line in lines]


def by_releases(older: Path) -> dict[str, list[Usage]]:
    """Results by version of Triton, the newest first; each release is compiled in a thread."""
    found: dict[str, list[Usage]] = {}

    def compile_in(directory: Path | None) -> None:
        version, usages = by_release(directory)
        found[version] = usages

    threads = [threading.Thread(target=compile_in, args=(d,)) for d in (None, older)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2, f"a release of Triton did not run, or both are the same: {[*found]}"
    return dict(sorted(found.items(), reverse=True))


def document(results: Mapping[str, Sequence[Usage]]) -> str:
    """The page with one table for each release of Triton."""
    targets = [f"sm_{capability}" for capability in SHARED_KB]
    lines = [
        "# The Triton kernels, compiled",
        "",
        "Written by `make gpu-aot`, without a GPU. For each target: registers of a thread, shared",
        "memory of a block in KiB, the matrix instruction, and what a thread spills to memory, if",
        "anything. A kernel marked `*` runs in every layer of a step and must not spill.",
    ]
    for version, usages in results.items():
        lines += ["", f"## Triton {version}", ""]
        lines += [f"| configuration | {' | '.join(targets)} |", "|---" * (1 + len(targets)) + "|"]
        cells: dict[str, list[str]] = {}
        for usage in usages:
            cells.setdefault(f"`{usage.name}`{' *' * usage.is_hot}", []).append(_cell(usage))
        lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    return "\n".join(lines) + "\n"


def _cell(usage: Usage) -> str:
    if usage.error:
        return "does not compile"
    parts = [str(usage.registers), f"{usage.shared / 1024:.3g} K", usage.product]
    if usage.spilled:
        parts.append(f"spills {usage.spilled}")
    return ", ".join(filter(None, parts))


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU.")
    parser.add_argument("--older", type=Path, help="folder of a second, older release of Triton")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        compile_all()
        return 0
    if args.older is None:
        parser.error("--older is required")
    results = by_releases(args.older.resolve())
    page = document(results)
    differs = args.check and (not RESULT.exists() or RESULT.read_text("utf-8") != page)
    if differs:
        print(f"{RESULT.relative_to(ROOT)} differs; write it with: make gpu-aot")
    elif not args.check:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(page, "utf-8")
    failed = False
    for version, usages in results.items():
        for usage in usages:
            if usage.problem:
                failed = True
                where = f"Triton {version}, sm_{usage.capability}"
                print(f"{usage.name} ({where}): {usage.problem}")
    every = [usage for usages in results.values() for usage in usages]
    figures = {
        "kernels": len({usage.name for usage in every}),
        "targets": [f"sm_{capability}" for capability in SHARED_KB],
        "spills": sum(usage.is_hot and usage.spilled > 0 for usage in every),
    }
    print(json.dumps(figures))
    return int(failed or differs)


if __name__ == "__main__":
    sys.exit(main())
