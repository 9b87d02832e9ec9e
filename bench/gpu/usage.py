"""Compiles kernels ahead of time, and reads what the compiler made of each configuration."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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

    def problem(self, shared_kb: int) -> str:
        """What is wrong with it on a target with so much shared memory; "" if nothing is."""
        if self.error:
            return self.error
        if self.is_hot and self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > shared_kb * 1024:
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
    options = {
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "enable_fp_fusion": compilation.is_fused,
    }
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
