"""Refusals: the reasons for them, and the one exception that carries a reason.

Every package raises `Refusal`, from the reader of a base model to the gRPC handlers. It says that
an input, a file or the machine is at fault; a fault of the program is an `assert` or another
exception.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum, auto
from typing import Final


class Reason(StrEnum):
    """Why something was refused or failed. Names are stable: clients, logs and metrics use them.

    `loraplex_server.rpc.calls.errors.TABLE` lists the reasons that a client of the server can meet,
    with the gRPC code of each; the others reach operators and the trainer's user only.
    """

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:
        return name

    # requests
    FIELD_INVALID = auto()
    """A field is out of its bounds; every field that is wrong is listed."""
    PROMPT_TOO_LONG = auto()
    """The prompt leaves no room for a generated token in the model's context."""
    STRUCTURE_INVALID = auto()
    """What structured output asks for is no valid schema, expression or grammar, or cannot be
    enforced, or is too complex."""
    STRUCTURE_FAILED = auto()
    """A completion could not go on as its structured output wants, for lack of a fitting token, or
    because the next token would have taken too much work to find."""
    REQUEST_MALFORMED = auto()
    """The bytes are not a message of the called method."""

    # callers
    CREDENTIALS_MISSING = auto()
    """The call has no credential, and the method is not for everybody."""
    CREDENTIALS_INVALID = auto()
    """The credential is unknown, has expired or was revoked."""
    PERMISSION_DENIED = auto()
    """The caller is known and may not do this, whether or not what it named exists."""
    QUOTA_EXCEEDED = auto()
    """The caller has used what it may use of the server."""

    # adapters
    ADAPTER_NOT_FOUND = auto()
    """No such adapter, or no such version of it."""
    ADAPTER_CONFLICT = auto()
    """The name is taken by other bytes, and `replace` was not set."""
    ADAPTER_INVALID = auto()
    """The adapter's files are damaged or contradict each other."""
    SIGNATURE_INVALID = auto()
    """The adapter has no signature that the operator's policy accepts for its name."""
    ADAPTER_UNSUPPORTED = auto()
    """The adapter uses an option that is not served."""
    BASE_MODEL_MISMATCH = auto()
    """The adapter does not fit the base model."""
    RANK_TOO_LARGE = auto()
    """A rank of the adapter is above the server's limit."""
    ADAPTER_TOO_LARGE = auto()
    """The adapter would not fit the adapter memory even alone."""
    ADAPTER_CORRUPT = auto()
    """The adapter's bytes in the store have changed since they were registered."""
    ADAPTER_UNLOADED = auto()
    """The adapter was unloaded by force while the request ran."""
    ADAPTER_QUARANTINED = auto()
    """The adapter is quarantined, because engine processes ended while it was loaded or merged."""
    ADAPTER_NOT_MIXABLE = auto()
    """The adapter can be used only alone: it has virtual tokens, or is an activated LoRA."""
    PIN_BUDGET = auto()
    """Pinned and merged adapters would take more of the device than they may."""
    MERGE_BUDGET = auto()
    """The dense copies of a merge do not fit the memory set aside for them."""
    MERGE_UNSUPPORTED = auto()
    """The adapter changes no matrix of the layers, so there is nothing to merge."""
    UPLOAD_NOT_FOUND = auto()
    """No such upload: it has expired, or its adapter is registered already."""
    UPLOAD_OFFSET = auto()
    """A piece of an upload does not follow what has arrived, or a file is incomplete."""
    STORE_FULL = auto()
    """The disk of the adapter store is full."""
    STORE_UNAVAILABLE = auto()
    """The adapter store cannot be read or written."""
    STORE_EXISTS = auto()
    """A backup is recovered only into a new store, and there is one already."""
    BACKUP_INVALID = auto()
    """The backup is damaged, not whole, of another store, or of another version."""
    BACKUP_FAILED = auto()
    """The directory of a backup cannot be read or written, or holds something else."""

    # exports and conversions
    EXPORT_UNSUPPORTED = auto()
    """The export's format cannot hold what the adapter changes."""
    EXPORT_EXISTS = auto()
    """The output folder exists and may not be replaced."""
    EXPORT_FAILED = auto()
    """The output folder cannot be written."""
    EXPORT_DELTA_LOST = auto()
    """Rounding into the export's type would lose too much of the adapter's change."""
    CONVERT_UNSUPPORTED = auto()
    """The adapter is not of a kind that can be converted."""

    # base models
    MODEL_NOT_FOUND = auto()
    """There is no model at the given place, or the hub does not have it."""
    MODEL_INVALID = auto()
    """The model's files are missing, damaged or contradict each other."""
    MODEL_UNSUPPORTED = auto()
    """The model is intact but of a kind that is not supported."""
    MODEL_UNAVAILABLE = auto()
    """The model could not be downloaded."""
    CACHE_FAILED = auto()
    """The cache folder cannot be written."""
    PACKAGE_UNSUPPORTED = auto()
    """An installed package is missing, or its version fails or computes wrong results."""
    NO_CUDA = auto()
    """CUDA was asked for and there is no CUDA device."""
    KV_TOO_SMALL = auto()
    """The KV cache has no room for a single sequence."""

    # training
    CONFIG_INVALID = auto()
    """An option of a training run, a variable of the environment, or a file of principals or of
    their credentials is wrong."""
    DATA_INVALID = auto()
    """Lines of a data set are wrong."""
    METHOD_INVALID = auto()
    """An option of a training method is wrong, or a module's name."""
    BASE_MISMATCH = auto()
    """A checkpoint of a run belongs to another base model."""
    CHECKPOINT_INVALID = auto()
    """A checkpoint of a run is damaged."""
    DISK_FULL = auto()
    """The disk is full."""
    OUT_OF_MEMORY = auto()
    """The memory ran out."""
    DIVERGED = auto()
    """The loss of a job diverged, or no evaluation was good enough to keep its adapter."""
    PUBLISH_FAILED = auto()
    """The trained adapter could not be handed over."""
    BUSY = auto()
    """Another process works in the same folder."""
    TRAINER_CRASHED = auto()
    """The trainer ended without an adapter and without a reason."""
    TIMEOUT = auto()
    """The trainer exceeded the operator's time limit."""
    INTERRUPTED = auto()
    """The server died several times while it trained the job."""
    TRAINING_DISABLED = auto()
    """The operator has not turned training on."""
    TRAINING_ELSEWHERE = auto()
    """Another server still owns the training jobs."""
    TRAINING_MEMORY = auto()
    """The job would take more memory than is free, or than it may."""
    JOB_NOT_FOUND = auto()
    """There is no such training job, or its record was removed."""
    JOB_CONFLICT = auto()
    """The request id was used for another training job."""
    JOB_QUEUE_FULL = auto()
    """The largest permitted number of training jobs is waiting."""
    DATA_NOT_FOUND = auto()
    """There is no such file of examples."""
    DATA_CONFLICT = auto()
    """The request id was used for a file of examples with other bytes."""
    DATA_FULL = auto()
    """The server keeps as many files of examples, or as many bytes of them, as it may."""
    DATA_CORRUPT = auto()
    """The bytes of a file of examples have changed since it was uploaded."""

    # the server
    OVERLOADED = auto()
    """The queue is full, in requests or in tokens."""
    DRAINING = auto()
    """The server is shutting down."""
    REQUEST_QUARANTINED = auto()
    """The engine ended each time that the request was computed."""
    ENGINE_RESTARTED = auto()
    """The engine is starting, or it died while the request ran."""
    DEADLINE_EXCEEDED = auto()
    """The call's deadline passed, or an upload or the check of a job took too long."""
    DEADLINE_UNMEETABLE = auto()
    """By measured rates the request would not end before its deadline, so it is not computed."""
    READER_STALLED = auto()
    """The client stopped reading its stream."""
    NON_FINITE_LOGITS = auto()
    """The request's logits were not finite; other requests of the batch are not affected."""
    ENGINE_FAULT = auto()
    """A fault of the server; its log has the details under the request's id."""


BASE_MODEL_REASONS: Final = frozenset(
    {
        Reason.MODEL_NOT_FOUND,
        Reason.MODEL_INVALID,
        Reason.MODEL_UNSUPPORTED,
        Reason.MODEL_UNAVAILABLE,
        Reason.CACHE_FAILED,
        Reason.PACKAGE_UNSUPPORTED,
    }
)
"""Reasons for which a base model cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        field: path of what is at fault: a request's field, an option, a configuration key, a
            tensor, a file; empty if there is no such name.
        message: what is wrong with it, for people.
        reason: the problem's own reason. `Refusal` sets its own where this is None.
    """

    field: str
    message: str
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """The resource that a refusal is about: its `kind` ("loraplex.v1.Adapter") and `name`."""

    kind: str = ""
    name: str = ""


NO_SUBJECT: Final = Subject()

PRINCIPAL_PREFIX: Final = "principal:"
"""What the subject of a refusal for a principal's limit begins with, before its name."""

SHOWN_PROBLEMS: Final = 3
"""Number of problems that the message of `Refusal.listing` repeats."""


class Refusal(Exception):
    """Something that cannot be done, with a stable reason and everything that was found wrong.

    Attributes:
        message: for people. A message whose reason is in the server's error table may be shown to
            any client; others are for the operator and may name paths.
        problems: everything that is wrong, at least one.
        subject: what the refusal is about, where it is a resource.
        retry_seconds: pause after which the same may succeed, in seconds; None for the usual one of
            the reason.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        field: str = "",
        *,
        problems: Iterable[Problem] = (),
        subject: Subject = NO_SUBJECT,
        retry_seconds: float | None = None,
    ) -> None:
        """`field` names what is at fault where `problems` are not given."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        listed = tuple(problems) or (Problem(field, message),)
        self.problems: Sequence[Problem] = tuple(
            problem if problem.reason else replace(problem, reason=reason) for problem in listed
        )
        self.subject = subject
        self.retry_seconds = retry_seconds

    @property
    def field(self) -> str:
        """The field of the first problem."""
        return self.problems[0].field

    @property
    def messages(self) -> list[str]:
        """The message of each problem."""
        return [problem.message for problem in self.problems]

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Refusal:
        """The refusal for a non-empty list of problems; the first gives reason and message."""
        first = problems[0]
        assert first.reason is not None, "a problem that stands for a refusal has a reason"
        return cls(first.reason, first.message, problems=problems)

    @classmethod
    def listing(cls, reason: Reason, problems: Iterable[Problem | str]) -> Refusal:
        """The refusal for a non-empty list of problems, whose message repeats the first ones."""
        found = [Problem("", p) if isinstance(p, str) else p for p in problems]
        return cls(reason, "; ".join(p.message for p in found[:SHOWN_PROBLEMS]), problems=found)


def model_invalid(message: str) -> Refusal:
    """The refusal of a base model whose files are missing, damaged or contradict each other."""
    return Refusal(Reason.MODEL_INVALID, message)


def model_unsupported(message: str) -> Refusal:
    """The refusal of a base model that is intact but of a kind that is not supported."""
    return Refusal(Reason.MODEL_UNSUPPORTED, message)


def quota_exceeded(
    principal: str, limit: str, text: str, retry_seconds: float = math.inf
) -> Refusal:
    """The refusal for one of a principal's limits, by its name.

    `text` continues "the principal NAME". With infinite `retry_seconds`, time alone does not help.
    """
    return Refusal(
        Reason.QUOTA_EXCEEDED,
        f"the principal {principal} {text} ({limit})",
        limit,
        subject=Subject("loraplex.Principal", PRINCIPAL_PREFIX + principal),
        retry_seconds=retry_seconds,
    )
