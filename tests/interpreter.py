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


def keep_types() -> None:
    """Keeps numpy's type for each of Triton's, which the interpreter looks up in new tables."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original, kept = interpreter._get_np_dtype, {}

    def number_type(given: Any) -> Any:
        scalar = given.scalar
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in kept:
            kept[scalar.name] = original(scalar)
        return kept[scalar.name]

    interpreter._get_np_dtype = number_type


if IS_INTERPRETED:
    patch_once()
    keep_types()
