"""The memory that a trainer may use next to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.runtime.process_memory import meminfo_bytes

_CGROUP: Final = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Returns the free bytes of this machine or container, whichever are fewer; None if unknown."""
    machine = meminfo_bytes("MemAvailable") or None
    found = [free for free in (machine, _container()) if free is not None]
    return min(found, default=None)


def check(needed: int, free: int | None, allowed: int, setting: str = "training_memory") -> None:
    """Raises Refusal(TRAINING_MEMORY) if `needed` bytes exceed `allowed` (0: no limit) or `free`.

    None for `free` means unknown, which refuses nothing.
    """
    if allowed and needed > allowed:
        text = f"the job would take about {_mib(needed)}; {setting} allows {_mib(allowed)}"
        raise Refusal(Reason.TRAINING_MEMORY, text, field=setting)
    if free is not None and needed > free:
        text = f"the job would take about {_mib(needed)}, and {_mib(free)} are free"
        raise Refusal(Reason.TRAINING_MEMORY, text, field="memory")


def _container() -> int | None:
    """Bytes left of the control group's limit (version 2), reclaimable page cache included."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cache = {name: int(value) for name, _, value in (line.partition(" ") for line in statistics)}
    return max(0, int(limit) - used + cache.get("inactive_file", 0))


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
