"""Shows a stream while it runs."""

from __future__ import annotations

from loraplex.cli import output
from loraplex.streams import Stream


def show(stream: Stream) -> str:
    """Write the deltas as they come, then the summary; returns the text.

    Whatever ends it, the line is ended too and the call cancelled if it still runs.
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
