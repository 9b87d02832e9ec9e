"""Messages for the operator when a command fails: one line, whatever the cause."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.exits import ServerExit

log = logging.getLogger(__name__)


class StartFailure(Exception):
    """The reason why the server cannot start. The message says what the operator can do."""

    def __init__(self, code: ServerExit, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def for_operator(refusal: Refusal) -> str:
    """The message of a refusal; for the store, with the error of the disk or the database.

    Clients never see that error, because it may name files and hosts.
    """
    cause = refusal.__cause__
    if refusal.reason not in (Reason.STORE_UNAVAILABLE, Reason.STORE_FULL) or cause is None:
        return refusal.message
    if isinstance(cause, OSError) and cause.strerror:
        where = f"{cause.filename}: " if cause.filename else ""
        return f"{refusal.message}: {where}{cause.strerror}"
    said = str(cause).strip().partition("\n")[0]
    return f"{refusal.message}: {said or type(cause).__name__}"


@contextmanager
def needed(code: ServerExit, what: str) -> Iterator[None]:
    """Turns a refusal or an OSError into StartFailure; `what` begins the message of the latter."""
    try:
        yield
    except Refusal as error:
        raise StartFailure(code, for_operator(error)) from error
    except OSError as error:
        file = f" {error.filename}" if error.filename else ""
        raise StartFailure(code, f"{what}{file}: {error.strerror}") from error


def unexpected(error: Exception) -> ServerExit:
    """Logs an error that nothing has handled, and prints one line for the operator."""
    log.critical("a command ended because of an unexpected error", exc_info=error)
    print(
        f"error: an unexpected error, {type(error).__name__}, ended the command; the lines above "
        "show where; please report them",
        file=sys.stderr,
        flush=True,
    )
    return ServerExit.INTERNAL
