"""A stand-in for CUDA graphs: launches that are recorded with their arguments, and repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu.launches import intercepted


def record(body: Callable[[], None]) -> Callable[[], None]:
    """Runs `body` and returns what repeats its launches, as a CUDA graph does.

    Grids, numbers and addresses are those of the recording; only the contents of tensors may have
    changed since. An operation of torch that returns a new tensor writes to the recorded one.
    """
    steps: list[Callable[[], object]] = []

    def kernel(launched: Any, grid: Any, arguments: Any, options: Any) -> None:
        steps.append(lambda: launched[grid](*arguments, **options))

    def operation(called: Any, arguments: Any, options: Any, result: Any) -> None:
        def again() -> None:
            computed = called(*arguments, **options)
            if computed is not result and isinstance(result, torch.Tensor):
                result.copy_(computed)

        steps.append(again)

    with intercepted(kernel, operation):
        body()

    def replay() -> None:
        for step in steps:
            step()

    return replay
