"""Creates a training job on the disk: its configuration, its examples, its plan, its record."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex_model.base.durable import flush
from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_server.access.rules import import_folder
from loraplex_server.training import data
from loraplex_server.training.files.record import DataFileRecord
from loraplex_server.training.files.shelf import DataShelf
from loraplex_server.training.jobs import JobRecord
from loraplex_server.training.records import Records, next_id
from loraplex_server.training.request import JobRequest
from loraplex_server.training.trainer import CONFIG, DATA, EVAL_DATA, Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobFactory:
    """Creates jobs. `data_bytes` limits a file of examples below `import_root`."""

    records: Records
    trainer: Trainer
    shelf: DataShelf
    import_root: Path
    data_bytes: int

    async def create(
        self, request: JobRequest, newest: str, held_bytes: int, require_open: Callable[[], None]
    ) -> JobRecord:
        """Creates a queued job. If anything fails, no file of it is left.

        `newest` is the id of the newest job, or "". `held_bytes` of memory will be free once the
        job starts. `require_open` is called just before the record is written and may raise.

        Raises Refusal: FIELD_INVALID, TRAINING_MEMORY, STORE_FULL, STORE_UNAVAILABLE, and the
        other reasons of `Trainer.plan`.
        """
        uploaded = self._uploaded(request)
        job_id = next_id(newest)
        try:
            folder = await self.trainer.lane.run(self.records.make, job_id)
            await self.trainer.lane.run(self._write, request, folder, uploaded)
            plan = await self.trainer.plan(folder)
            self.trainer.require(plan, held_bytes)
            require_open()
            job = JobRecord(
                id=job_id,
                order=request.order,
                owner=request.owner,
                request_id=request.request_id,
                content=request.content(),
                created=time.time(),
                estimated_bytes=plan.bytes,
            )
            await self.trainer.lane.run(self.records.save, job)
            return job
        except BaseException as error:
            removing = asyncio.create_task(self.trainer.lane.run(self.records.remove, job_id))
            await asyncio.shield(removing)
            if isinstance(error, OSError):
                log.error("a training job cannot be written: %s", error)
                raise data.from_os_error(error) from error
            raise

    def _uploaded(self, request: JobRequest) -> Mapping[str, DataFileRecord]:
        """The uploaded files that a request names, by its fields. Raises Refusal(FIELD_INVALID)."""
        found = {}
        for field, source in (("data", request.data), ("eval_data", request.eval_data)):
            if source is not None and source.data_id:
                with _of_field(f"{field}.data_id"):
                    found[field] = self.shelf.get(source.data_id, request.principal.owner)
        return found

    def _write(
        self, request: JobRequest, folder: Path, uploaded: Mapping[str, DataFileRecord]
    ) -> None:
        """Writes the job's configuration and the copies of its examples. Blocks."""
        evaluated = request.eval_data is not None
        configuration = self.trainer.configuration(request.order, folder, evaluated)
        data.write(folder / CONFIG, configuration.encode())
        sources = {"data": (request.data, DATA), "eval_data": (request.eval_data, EVAL_DATA)}
        for field, (source, name) in sources.items():
            if source is not None and source.path:
                path = f"{field}.path"
                root = import_folder(request.principal, self.import_root)
                data.copy(root, source.path, folder / name, self.data_bytes, path)
            elif field in uploaded:
                with _of_field(f"{field}.data_id"):
                    self.shelf.copy(uploaded[field], folder / name)
            elif source is not None:
                data.write(folder / name, source.jsonl)
        flush(folder)  # before the record is there: a job with a record has all of its inputs


@contextmanager
def _of_field(field: str) -> Iterator[None]:
    """Turns a file that does not exist for the caller into a wrong value of a field."""
    try:
        yield
    except Refusal as error:
        if error.reason is not Reason.DATA_NOT_FOUND:
            raise
        problems = [Problem(field, error.message)]
        raise Refusal(Reason.FIELD_INVALID, error.message, problems=problems) from error
