"""A command's connection to the server. A failure becomes one line of advice and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import typer

from loraplex import errors
from loraplex.cli import output
from loraplex.cli.access import GivenServer
from loraplex.client import Client

T = TypeVar("T")


class ExitStatus(IntEnum):
    """The exit statuses of the command `loraplex`, for scripts."""

    OK = 0
    FAULT = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    DEADLINE = 5
    REFUSED = 6
    INTERRUPTED = 130


_EXIT_STATUSES: tuple[tuple[type[errors.LoraplexError], ExitStatus], ...] = (
    (errors.InvalidRequest, ExitStatus.USAGE),
    (errors.NotFound, ExitStatus.NOT_FOUND),
    (errors.Unavailable, ExitStatus.UNAVAILABLE),
    (errors.AdapterUnloaded, ExitStatus.UNAVAILABLE),
    (errors.DeadlineExceeded, ExitStatus.DEADLINE),
    (errors.AdapterConflict, ExitStatus.REFUSED),
    (errors.JobConflict, ExitStatus.REFUSED),
    (errors.FailedPrecondition, ExitStatus.REFUSED),
    (errors.PermissionDenied, ExitStatus.REFUSED),
    (errors.ResourceExhausted, ExitStatus.REFUSED),
)

# By the server's reason, and by the error's class for all other reasons.
_ADVICE: dict[str | type[errors.LoraplexError], str] = {
    "PROMPT_TOO_LONG": "shorten the prompt or lower --max-new-tokens",
    "ADAPTER_NOT_MIXABLE": "use it alone, with --adapter",
    "ADAPTER_QUARANTINED": "ask the server's operator to release it",
    "TRAINING_MEMORY": "lower --batch-size or --max-length to use less memory",
    "JOB_QUEUE_FULL": "wait for a job to end, or cancel one with `loraplex train cancel`",
    "PIN_BUDGET": "unpin or unmerge another adapter",
    "MERGE_BUDGET": "unmerge another adapter",
    errors.InvalidRequest: "the command's --help lists the values that it accepts",
    errors.AdapterNotFound: "`loraplex adapters list` shows the registered names",
    errors.JobNotFound: "`loraplex train list` shows the jobs",
    errors.JobConflict: "omit --request-id or choose another one",
    errors.UploadNotFound: "start a new upload, without --resume",
    errors.AdapterConflict: "use --replace to move the name to these bytes, or choose another name",
    errors.AdapterUnloaded: "run the command again to load it again",
    errors.AdapterRejected: "correct the adapter; nothing was changed on the server",
    errors.Unavailable: "try again in a moment",
    errors.DeadlineExceeded: "raise --timeout, or request fewer tokens",
    errors.PermissionDenied: "ask the server's operator for access",
    errors.Unauthenticated: "give a valid key with --key-file, LORAPLEX_KEY_FILE or LORAPLEX_KEY",
}


@dataclass(frozen=True, slots=True)
class Session:
    """A command's client, and the values of the options that all commands share."""

    client: Client
    target: str
    timeout: float
    as_json: bool

    def show(self, value: T, write: Callable[[T], None]) -> None:
        """Prints a result as JSON or with `write`, as the command line asks for."""
        if self.as_json:
            output.write_json(value)
        else:
            write(value)


@contextmanager
def session(address: GivenServer, timeout: float, as_json: bool) -> Iterator[Session]:
    """Connects to the server at `address`.

    On exit, the connection is closed, which cancels running calls. A LoraplexError or Ctrl-C
    becomes one line on standard error and an exit status.
    """
    # gRPC's own log lines ("connection refused" and the like) would repeat ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        with Client(address.shown, timeout=timeout, **address.access) as client:
            yield Session(client, address.shown, timeout, as_json)
    except errors.LoraplexError as error:
        complain(error, address.shown)
        raise typer.Exit(exit_status(error)) from None
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        raise typer.Exit(ExitStatus.INTERRUPTED) from None


def complain(error: errors.LoraplexError, target: str) -> None:
    """Prints the error and what to do about it, as one line on standard error."""
    what = " ".join(error.sentence.split())
    advice = _advice(error, target)
    print(f"loraplex: {what}" + (f"; {advice}" if advice else ""), file=sys.stderr)


def exit_status(error: errors.LoraplexError) -> ExitStatus:
    for kind, status in _EXIT_STATUSES:
        if isinstance(error, kind):
            return status
    return ExitStatus.FAULT


def _advice(error: errors.LoraplexError, target: str) -> str:
    match error:
        case errors.Unavailable(retry_after=float() as seconds):
            return f"try again in {seconds:g} s"
        case errors.Unavailable(reason=""):
            return (
                f"is a server running at {target}? Use --server or LORAPLEX_SERVER for another, "
                "and --tls or --ca if it encrypts"
            )
        case errors.QuotaExceeded():
            return error.advice
        case errors.Unsupported():
            return f"{target} is not a Loraplex server, or is older than this client"
        case errors.ServerFault() if error.request_id:
            return f"the server's log has details under request id {error.request_id}"
    return _ADVICE.get(error.reason) or _ADVICE.get(type(error), "")
