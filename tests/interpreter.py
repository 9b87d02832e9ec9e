"""Triton's interpreter for tests: whether it is there, and made faster."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
"""Whether the kernels for CUDA run in Triton's interpreter, on tensors in host memory."""


def patch_once() -> None:
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
    patch_once()
