"""Becomes another program that must not outlive, nor disturb, the one that started it.

    python launch.py PARENT NICENESS COMMAND...

It runs COMMAND in its own place, so pid and pipes stay. Linux kills it when its parent dies, and
when memory runs out it goes before anybody else does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
ORPHANED: Final = 3
"""Exit status when the parent had gone before."""


def main(arguments: list[str]) -> None:
    parent, niceness, *command = arguments
    # A shell's background job ignores Ctrl-C and would hand that down; we are stopped with it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(OSError):
        os.nice(int(niceness))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(ORPHANED)
    os.execvp(command[0], command)  # noqa: S606  (there is no shell)


if __name__ == "__main__":
    main(sys.argv[1:])
