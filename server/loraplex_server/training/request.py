"""A client's request for a training job: what to train and which examples to train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from loraplex_server.access.principals import EVERYBODY, Principal
from loraplex_server.training.jobs import JobOrder, JobOwner


@dataclass(frozen=True, slots=True)
class DataSource:
    """Examples of a request: their bytes, or the path of a file below the import root."""

    jsonl: bytes = b""
    path: str = ""

    def identity(self) -> list[str]:
        """Returns values that are equal for equal examples only."""
        return [self.path, hashlib.sha256(self.jsonl).hexdigest()]


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
        """Returns the digest of order and examples."""
        parts = [self.data.identity(), self.eval_data.identity() if self.eval_data else None]
        text = msgspec.json.encode([self.order, parts], order="deterministic")
        return hashlib.sha256(text).hexdigest()
