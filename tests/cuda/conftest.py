"""Tests of the Triton kernels in Triton's interpreter; `make test-triton` runs them."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None

# Modules that import kernels can be collected only where Triton is installed.
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*_kernels.py", "test_*_decoder.py"]


def _patch_once() -> None:
    """Makes calls of device functions, `tl.sum` among them, several times faster.

    The interpreter replaces all functions of `triton.language` at every such call, although they
    are replaced already while a kernel runs.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    @cache
    def languages(function: FunctionType) -> list[ModuleType]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def call(self: Any, *args: object, **kwargs: object) -> object:
        if any(tl.core.is_builtin(language.full) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if IS_INTERPRETED:
    _patch_once()
