"""Counts what a decoder's pass launches, on a device or in Triton's interpreter.

    with watched() as seen:
        decoder.forward(batch)
    seen.launches      names of kernels and of torch's operations, in order
    seen.waits         operations that stop the host until the device is done, or copy from the host

Views and allocations launch nothing and are left out. Copies that a decoder makes through its
`Transfers` are counted there, and are no launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

WAITS = frozenset({
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "repeat_interleave",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
})  # fmt: skip
"""Operations whose result has a size or value that the host must know, and copies from a list."""

_FREE = frozenset({
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "reshape",
    "resize_",
    "set_",
    "_unsafe_view",
})  # fmt: skip

Kernel = Callable[[Any, Any, Sequence[Any], Mapping[str, Any]], None]
"""Is given the kernel, its grid, its arguments and its options after each launch."""

Operation = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]
"""Is given the operation, its arguments, its options and its result after each call."""


@dataclass(slots=True)
class Watched:
    """What was launched while watching."""

    launches: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Watched]:
    """Records the names of all launches and of all operations that stop the host."""
    seen = Watched()

    def kernel(launched: Any, grid: Any, arguments: Any, options: Any) -> None:
        seen.launches.append(launched.__name__)

    def operation(called: Any, arguments: Any, options: Any, result: Any) -> None:
        name = name_of(called)
        if name in WAITS or _has_mask(name, arguments) or _leaves_the_device(arguments, result):
            seen.waits.append(name)
        else:
            seen.launches.append(name)

    with intercepted(kernel, operation):
        yield seen


@contextmanager
def intercepted(kernel: Kernel, operation: Operation) -> Iterator[None]:
    """Reports every launch of a Triton kernel and every operation of torch that is no view.

    Operations inside of the interpreter are not reported.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def patched(original: Any) -> Any:
        def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            with _disable_current_modes():
                result = original(self, *args, grid=grid, warmup=warmup, **options)
            if not warmup:
                kernel(self, grid, args, options)
            return result

        return run

    originals = [(kind, kind.run) for kind in (InterpretedFunction, JITFunction)]
    for kind, original in originals:
        kind.run = patched(original)
    try:
        with _Operations(operation):
            yield
    finally:
        for kind, original in originals:
            kind.run = original


class _Operations(TorchDispatchMode):
    def __init__(self, report: Operation) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = name_of(func)
        if name in WAITS or not (func.is_view or name in _FREE):  # `lift_fresh` is marked as a view
            self._report(func, args, kwargs, result)
        return result


def name_of(operation: Any) -> str:
    """The name of an operation of torch without its namespace and its overload."""
    return str(operation.name()).removeprefix("aten::").partition(".")[0]


def _has_mask(name: str, arguments: Sequence[Any]) -> bool:
    """Whether an operation indexes by a mask, whose number of elements the host must know."""
    if not name.startswith(("index", "_index_put")) or len(arguments) < 2:
        return False
    indices = arguments[1] if isinstance(arguments[1], (list, tuple)) else ()
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


def _leaves_the_device(arguments: Sequence[Any], result: Any) -> bool:
    if not isinstance(result, torch.Tensor):
        return False
    devices = {value.device.type for value in arguments if isinstance(value, torch.Tensor)}
    return bool(devices) and devices != {result.device.type}
