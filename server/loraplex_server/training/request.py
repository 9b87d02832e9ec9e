"""A client's request for a training job: what to train and which examples to train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from loraplex_server.access.principals import EVERYBODY, Principal
from loraplex_server.training.jobs import JobOrder, JobOwner


@dataclass(frozen=True, slots=True)
class DataSource:
    """Examples of a request: their bytes, the path of a file below the import root, or the id of
    an uploaded file."""

    jsonl: bytes = b""
    path: str = ""
    data_id: str = ""

    def identity(self) -> list[str]:
        """Returns values that are equal for equal examples only."""
        uploaded = [self.data_id] if self.data_id else []
        return [self.path, hashlib.sha256(self.jsonl).hexdigest(), *uploaded]


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request of a principal for a training job; `request_id` is the client's own, or ""."""

    order: JobOrder
    data: DataSource
    eval_data: DataSource | None = None
    request_id: str = ""
    principal: Principal = EVERYBODY

    @property
    def owner(self) -> JobOwner:
        """The principal as the job's record keeps it."""
        return JobOwner(self.principal.name, str(self.principal.seen), self.principal.copies)

    def content(self) -> str:
        """Returns the digest of order and examples.

        It is that of earlier versions for a request that an earlier version could have taken.
        """
        parts = [self.data.identity(), self.eval_data.identity() if self.eval_data else None]
        order = msgspec.to_builtins(self.order)
        if not self.order.checkpoints:
            del order["checkpoints"]
        text = msgspec.json.encode([order, parts], order="deterministic")
        return hashlib.sha256(text).hexdigest()
