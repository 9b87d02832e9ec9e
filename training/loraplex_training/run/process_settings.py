"""Process-wide torch settings for the length of a run; running out of memory is a Refusal."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.spec.spec import RunSpec

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of `mallopt`, from glibc's malloc.h."""
_NEVER = (1 << 31) - 1
"""Bytes above which memory is returned to the system, or asked for by a call of its own."""


@contextmanager
def process_settings(spec: RunSpec) -> Iterator[None]:
    """Sets the run's number of threads and deterministic algorithms; restores both at the end.

    Also calls `keep_freed_memory`, for as long as the process lives.
    Raises Refusal(OUT_OF_MEMORY) in place of the errors of Python and torch.
    """
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    keep_freed_memory()
    if spec.threads:
        torch.set_num_threads(spec.threads)
    if torch.cuda.is_available() and spec.device != "cpu":
        # Sums of rows in a fixed order. A CPU has that anyway, for the same number of threads.
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sizes = ", ".join(
            f"{job.name}: batch_size={job.batch_size}, max_length={job.data.max_length}"
            for job in spec.jobs[:4]
        )
        advice = "" if spec.checkpointing else ", or with checkpointing"
        raise Refusal(
            Reason.OUT_OF_MEMORY,
            f"there is not enough memory ({_first_line(error)}); start a new run with a lower "
            f"batch_size or max_length (now {sizes}), with fewer jobs at once{advice}; or resume "
            "this run where there is more memory: its last checkpoint is undamaged",
        ) from error
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warn)


def keep_freed_memory() -> None:
    """Tells glibc to keep memory that is freed, which the next pass then has without page faults.

    Otherwise large tensors come from the system, zeroed page by page, and go back to it in every
    pass. The peak does not change. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, _NEVER)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "out of memory" in text


def _first_line(error: BaseException) -> str:
    """The first line of torch's message, which names the size of the allocation."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "an allocation failed"
