"""Compiles every Triton kernel for several kinds of GPU, without one: make gpu-aot

    python bench/gpu_aot.py --older DIRECTORY [--check]

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
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gpu.usage import SHARED_KB, Usage, compilations, compile_one

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu-aot.md"


def compile_all() -> None:
    """The part of one release of Triton: prints its version, then one line for each `Usage`."""
    import triton

    print(json.dumps(triton.__version__), flush=True)
    for compilation in compilations():
        for capability in compilation.targets:
            print(json.dumps(asdict(compile_one(compilation, capability))), flush=True)


def by_release(directory: Path | None) -> tuple[str, list[Usage]]:
    """Version and results of the Triton in `directory`, or of the one that this Python has."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_ALWAYS_COMPILE": "1",  # what comes from the cache has no log
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
        "anything. A kernel marked `*` runs in every layer of a step and must not spill. A cell is",
        "empty if devices of that kind do not use the configuration.",
    ]
    for version, usages in results.items():
        lines += ["", f"## Triton {version}", ""]
        lines += [f"| configuration | {' | '.join(targets)} |", "|---" * (1 + len(targets)) + "|"]
        cells: dict[str, dict[int, str]] = {}
        for usage in usages:
            row = cells.setdefault(f"`{usage.name}`{' *' * usage.is_hot}", {})
            row[usage.capability] = _cell(usage)
        for name, row in cells.items():
            lines.append(f"| {name} | {' | '.join(row.get(each, '') for each in SHARED_KB)} |")
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
            if problem := usage.problem(SHARED_KB[usage.capability]):
                failed = True
                where = f"Triton {version}, sm_{usage.capability}"
                print(f"{usage.name} ({where}): {problem}")
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
