"""One command's connection; a failure becomes a line that says what to do, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer

from loraplex import channel, errors
from loraplex.client import Client


class ExitCode(IntEnum):
    """What a script can tell from the exit status."""

    OK = 0
    FAULT = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    DEADLINE = 5
    REFUSED = 6
    INTERRUPTED = 130


_EXIT_CODES: tuple[tuple[type[errors.LoraplexError], ExitCode], ...] = (
    (errors.InvalidRequest, ExitCode.USAGE),
    (errors.NotFound, ExitCode.NOT_FOUND),
    (errors.Unavailable, ExitCode.UNAVAILABLE),
    (errors.AdapterUnloaded, ExitCode.UNAVAILABLE),
    (errors.DeadlineExceeded, ExitCode.DEADLINE),
    (errors.AdapterConflict, ExitCode.REFUSED),
    (errors.JobConflict, ExitCode.REFUSED),
    (errors.FailedPrecondition, ExitCode.REFUSED),
    (errors.PermissionDenied, ExitCode.REFUSED),
    (errors.ResourceExhausted, ExitCode.REFUSED),
)


@contextmanager
def session(ctx: typer.Context, server: str | None, timeout: float) -> Iterator[Client]:
    """A client for the server that the command, its group or the environment names.

    On the way out the connection is closed, which cancels what still runs, and a LoraplexError or
    Ctrl-C becomes one line on standard error and an exit code.
    """
    target = server or ctx.obj or channel.DEFAULT_TARGET
    # gRPC's own log lines ("connection refused" and the like) would double ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        with Client(target, timeout=timeout) as client:
            yield client
    except errors.LoraplexError as error:
        complain(error, target)
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def complain(error: errors.LoraplexError, target: str) -> None:
    """The error and what to do about it, in one line on standard error."""
    what = " ".join(str(error).split())
    advice = _advice(error, target)
    print(f"loraplex: {what}" + (f"; {advice}" if advice else ""), file=sys.stderr)


def exit_code(error: errors.LoraplexError) -> ExitCode:
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            return code
    return ExitCode.FAULT


def _advice(error: errors.LoraplexError, target: str) -> str:
    match error:
        case errors.InvalidRequest(reason="PROMPT_TOO_LONG"):
            return "shorten the prompt or lower --max-new-tokens"
        case errors.InvalidRequest(reason="ADAPTER_NOT_MIXABLE"):
            return "use it alone, with --adapter"
        case errors.InvalidRequest():
            return "see the command's --help for what it takes"
        case errors.AdapterNotFound():
            return "`loraplex adapters list` shows the names there are"
        case errors.JobNotFound():
            return "`loraplex train list` shows the jobs there are"
        case errors.JobConflict():
            return "leave --request-id out, or choose another"
        case errors.FailedPrecondition(reason="TRAINING_MEMORY"):
            return "a smaller --batch-size or --max-length takes less"
        case errors.ResourceExhausted(reason="JOB_QUEUE_FULL"):
            return "wait for a job to end, or cancel one"
        case errors.UploadNotFound():
            return "start again without --resume"
        case errors.ResourceExhausted(reason="PIN_BUDGET"):
            return "unpin or unmerge another adapter"
        case errors.ResourceExhausted(reason="MERGE_BUDGET"):
            return "unmerge another adapter"
        case errors.AdapterConflict():
            return "give --replace to move the name to these bytes, or choose another name"
        case errors.AdapterUnloaded():
            return "run the command again to load it again"
        case errors.AdapterRejected():
            return "the adapter needs changing; the server keeps what it had"
        case errors.Unavailable(retry_after=float() as seconds):
            return f"try again in {seconds:g} s"
        case errors.Unavailable(reason=""):
            return f"is a server running at {target}? --server or LORAPLEX_SERVER names another"
        case errors.Unavailable():
            return "try again in a moment"
        case errors.DeadlineExceeded():
            return "give it longer with --timeout, or ask for fewer tokens"
        case errors.PermissionDenied():
            return "ask the server's operator for access"
        case errors.Unsupported():
            return f"{target} is not a Loraplex server, or an older one"
        case errors.ServerFault() if error.request_id:
            return f"the server's log has more under request id {error.request_id}"
    return ""
