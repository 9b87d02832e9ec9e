"""What a terminal or pipe cannot encode is replaced, and never ends a command with an exception."""

from __future__ import annotations

import io
import sys


def adapt_streams() -> None:
    """Makes the standard streams take any text.

    Characters outside the encoding are printed as "?". Input that is not text in the encoding is
    kept in surrogates, which no request can carry, so it is refused with the field's name.
    """
    for stream, errors in (
        (sys.stdout, "replace"),
        (sys.stderr, "replace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def can_show(text: str) -> bool:
    """Whether standard output shows every character of a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
