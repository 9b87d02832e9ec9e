"""S1: all kernels compiled for this device, with their registers, spills and shared memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from gpu.stage import StageReport
from gpu.usage import SHARED_KB, Usage, compilations, compile_one

WORKERS = 12
DRY_CAPABILITY = 90


def run(report: StageReport) -> None:
    """Compiles every configuration; without a device one of each module, for sm_90.

    The compiled kernels stay in Triton's cache, where the next stages find those whose arguments
    they use.
    """
    capability = DRY_CAPABILITY
    if report.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a kernel from the cache has no compiler log
    target = 90 if capability // 10 == 9 else 80  # others use the configurations of 8.0
    names = [each.name for each in compilations() if target in each.targets]
    if report.dry:
        kernels = {compilation.kernel: compilation.name for compilation in compilations()}
        usages = compile_named(list(kernels.values())[:4], capability)
    else:
        usages = []
        workers = min(WORKERS, os.cpu_count() or 1, len(names))
        parts = [names[i::workers] for i in range(workers)]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            tasks = [pool.submit(compile_named, part, capability) for part in parts if part]
            for task in as_completed(tasks):
                usages += task.result()
    shared = SHARED_KB.get(capability, min(SHARED_KB.values()))
    for usage in usages:
        problem = usage.problem(shared)
        report.check(not problem, f"{usage.name} on sm_{capability}: {problem}")
    report.figure("configurations", len(usages))
    report.figure("registers", {usage.name: usage.registers for usage in usages})
    report.figure("most_shared_kb", max((usage.shared for usage in usages), default=0) / 1024)
    report.check(bool(usages), "no kernel names a configuration")


def compile_named(names: Sequence[str], capability: int) -> list[Usage]:
    """Compiles the named configurations, in this process."""
    wanted = set(names)
    chosen = [compilation for compilation in compilations() if compilation.name in wanted]
    return [compile_one(compilation, capability) for compilation in chosen]
