"""Standard output of commands on terminals that cannot show every character."""

from __future__ import annotations

import io
import sys


def adapt_output() -> None:
    """Makes standard output print "?" for characters that it cannot encode, as in Latin-1.

    Standard error needs nothing: Python escapes such characters there.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
