"""Memory of this process and the processes that it started, and what the system gives them.

Reads files of the kind that every user may read, so that it also works for processes that hide
their own memory from others.
"""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

PART_OF_GRANT: Final = 0.9
"""Part of what the system gives that the server uses without a setting."""

_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_COUNTED: Final = (b"RssAnon:", b"RssShmem:")
"""Pages that cannot be taken back by the system. Those of mapped files can."""


def used_bytes(proc: Path = _PROC) -> int:
    """Memory of this process and of all below it, without mapped files; 0 if it is unknown."""
    return sum(_of_process(proc, pid) for pid in _family(proc, os.getpid()))


def default_limit(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """The part of the system's memory that the server may use by default; 0 if it is unknown."""
    return int(PART_OF_GRANT * granted_bytes(proc, cgroups))


def granted_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Memory of the machine, or of the control group if it may use less; 0 if it is unknown."""
    limits = [meminfo_bytes("MemTotal", proc), *_control_groups(proc, cgroups)]
    return min((limit for limit in limits if limit), default=0)


def meminfo_bytes(field: str, proc: Path = _PROC) -> int:
    """A field of /proc/meminfo, such as "MemTotal", in bytes; 0 if it is unknown."""
    with suppress(OSError, ValueError):
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.removesuffix("kB")) << 10
    return 0


def _family(proc: Path, pid: int) -> set[int]:
    """A process and those below it. The server starts processes in its main thread only."""
    found, coming = {pid}, [pid]
    while coming:
        parent = coming.pop()
        with suppress(OSError):  # it has ended
            children = (proc / f"{parent}/task/{parent}/children").read_text().split()
            new = set(map(int, children)) - found
            found |= new
            coming.extend(new)
    return found


def _of_process(proc: Path, pid: int) -> int:
    try:
        lines = (proc / f"{pid}/status").read_bytes().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(_COUNTED))


def _control_groups(proc: Path, cgroups: Path) -> list[int]:
    """The limits of the control groups that this process is in, from the root on.

    In a container the path may be that of the host, of which only the root is visible. Version 1
    has a folder and files of its own for memory; its number for "no limit" is larger than any
    machine's memory.
    """
    places = [(cgroups, "memory.max"), (cgroups / "memory", "memory.limit_in_bytes")]
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, file = places[0]
            elif "memory" in controllers.split(","):
                root, file = places[1]
            else:
                continue
            inside = PurePosixPath(path.lstrip("/"))
            places += [(root / parent, file) for parent in (inside, *inside.parents)]
    limits = []
    for place, file in places:
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int((place / file).read_text()))
    return limits


def give_back() -> None:
    """Returns to the system what this process has freed: caches of the interpreter and of malloc.

    Takes some milliseconds. Without effect on malloc where the C library is not glibc.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
