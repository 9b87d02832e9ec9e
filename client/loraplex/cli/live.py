"""Prints a stream while it runs."""

from __future__ import annotations

from loraplex.cli import output
from loraplex.streams import Stream


def show(stream: Stream) -> str:
    """Prints the deltas as they arrive, then the summary; returns the text.

    However the stream ends, the line is ended and a running call cancelled.
    """
    pieces: list[str] = []
    with stream:
        try:
            for delta in stream:
                pieces.append(delta.text)
                output.write_text(delta.text)
        finally:
            if pieces:
                output.write_text("\n")
    if stream.finished is not None:
        done = stream.finished
        output.write_summary(done.finish_reason, done.usage, done.adapters)
    return "".join(pieces)
