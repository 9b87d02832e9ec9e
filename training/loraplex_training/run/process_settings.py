"""What a run sets of the process that it runs in, and the end of its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.spec.spec import RunSpec


@contextmanager
def surroundings(spec: RunSpec) -> Iterator[None]:
    """The run's threads and torch's choice of algorithms; both are put back in the end.

    Raises Refusal(OUT_OF_MEMORY) for what Python and torch raise when there is no more.
    """
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if spec.threads:
        torch.set_num_threads(spec.threads)
    if torch.cuda.is_available() and spec.device != "cpu":
        # sums of rows in a fixed order; on a CPU they are, with the same number of threads
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
        advice = "" if spec.checkpointing else ", or set checkpointing"
        raise Refusal(
            Reason.OUT_OF_MEMORY,
            f"there is not enough memory ({_what_torch_says(error)}); in a new run, lower "
            f"batch_size or max_length (now {sizes}), train fewer jobs at once{advice}; or resume "
            "this one where there is more memory: what it has saved is whole",
        ) from error
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warn)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "out of memory" in text


def _what_torch_says(error: BaseException) -> str:
    """Which names how much was asked for."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "the machine has no more"
