"""Commands whose standard output cannot encode a character print "?" in its place."""

from __future__ import annotations

import io
import sys


def adapt_output() -> None:
    """Makes standard output take any text, such as on a terminal in Latin-1.

    Standard error does so by itself: Python escapes there what cannot be encoded.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
