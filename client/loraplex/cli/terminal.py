"""Text in and out of commands, whatever a terminal or pipe can encode."""

from __future__ import annotations

import io
import sys


def adapt_streams() -> None:
    """Makes the standard streams take any text.

    Standard output shows "?" for what it cannot encode; standard error escapes it by itself. Bytes
    of standard input that are no text in its encoding are kept for `recovered`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def recovered(text: str) -> str:
    """Returns the text of bytes that Python could not decode, as in the locale C, if it is UTF-8.

    Any other text is returned as it is; no request can carry undecoded bytes.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return text


def can_show(text: str) -> bool:
    """Whether standard output shows every character of a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
