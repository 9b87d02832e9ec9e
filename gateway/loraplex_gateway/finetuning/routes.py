"""`/v1/fine_tuning/jobs`: create, list, describe and cancel jobs; their events and checkpoints."""

from __future__ import annotations

from typing import Final

from loraplex import AsyncClient, JobNotFound, LoraplexError, TrainingJob
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway import errors
from loraplex_gateway.context import Context, bearer
from loraplex_gateway.errors import ApiError
from loraplex_gateway.files.objects import data_id
from loraplex_gateway.finetuning.labels import JobLabels
from loraplex_gateway.finetuning.names import (
    adapter_name,
    event_number,
    model_id,
    new_key,
    no_job,
    server_job_id,
)
from loraplex_gateway.finetuning.objects import checkpoint_object, event_object, job_object
from loraplex_gateway.finetuning.order import FineTuningOrder
from loraplex_gateway.wire import bodies
from loraplex_gateway.wire.paging import limit_of, page_of

JOBS: Final = "/v1/fine_tuning/jobs"

_MOST: Final = 1000
_IGNORED: Final = bodies.HARMLESS - {"metadata"}


def routes(context: Context) -> list[BaseRoute]:
    """The routes of fine-tuning."""
    jobs = FineTuningRoutes(context)
    return [
        Route(JOBS, jobs.create, methods=["POST"]),
        Route(JOBS, jobs.listed, methods=["GET"]),
        Route(f"{JOBS}/{{job}}", jobs.one, methods=["GET"]),
        Route(f"{JOBS}/{{job}}/cancel", jobs.cancel, methods=["POST"]),
        Route(f"{JOBS}/{{job}}/pause", jobs.unsupported, methods=["POST"]),
        Route(f"{JOBS}/{{job}}/resume", jobs.unsupported, methods=["POST"]),
        Route(f"{JOBS}/{{job}}/events", jobs.events, methods=["GET"]),
        Route(f"{JOBS}/{{job}}/checkpoints", jobs.checkpoints, methods=["GET"]),
    ]


class FineTuningRoutes:
    """The handlers of fine-tuning."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """Checks and queues a job."""
        limit = self._context.settings.max_body_bytes
        order = await bodies.read(request, FineTuningOrder, limit, _IGNORED)
        order.require_supported()
        client = self._context.client_for(request)
        if adapter := await self._context.ids.adapter(client, order.model, bearer(request)):
            await client.get_adapter(adapter)  # which may not exist
            text = "only the base model can be fine-tuned, not a model that was made of it"
            raise ApiError(400, f"model: {text}", param="model", code="invalid_value")
        base = await self._context.ids.base_id(client)
        job = await _create(client, order, base, request.headers.get("idempotency-key", ""))
        return JSONResponse(job_object(job, base))

    async def listed(self, request: Request) -> Response:
        """Lists a page of jobs."""
        limit, query = limit_of(request, 20, _MOST), request.query_params
        client = self._context.client_for(request)
        found = await client.training.list()
        if "after" in query:
            after = server_job_id(query["after"], "after")
            found = [job for job in found if job.job_id < after]
        for key, text in query.items():
            if key.startswith("metadata[") and key.endswith("]"):
                label = key[len("metadata[") : -1]
                found = [job for job in found if job.delivery.labels.get(label) == text]
        base = await self._context.ids.base_id(client)
        return JSONResponse(page_of([job_object(job, base) for job in found[: limit + 1]], limit))

    async def one(self, request: Request) -> Response:
        """Describes a job."""
        client = self._context.client_for(request)
        job = await _found(client, request)
        return JSONResponse(job_object(job, await self._context.ids.base_id(client)))

    async def cancel(self, request: Request) -> Response:
        """Cancels a job and waits for its end."""
        client, job = self._context.client_for(request), request.path_params["job"]
        try:
            done = await client.training.cancel(server_job_id(job))
        except JobNotFound:
            raise no_job(job) from None
        return JSONResponse(job_object(done, await self._context.ids.base_id(client)))

    async def unsupported(self, request: Request) -> Response:
        """Refuses to pause or resume a job."""
        what = request.url.path.rpartition("/")[2]
        text = f"{what}: jobs cannot be paused here; one that is cancelled keeps its checkpoints"
        raise ApiError(400, text, code="unsupported_operation")

    async def events(self, request: Request) -> Response:
        """Lists a page of events."""
        limit, query = limit_of(request, 20, _MOST), request.query_params
        after = event_number(query["after"]) if "after" in query else 0
        client, job = self._context.client_for(request), request.path_params["job"]
        known = server_job_id(job)
        try:
            found = await client.training.events(
                known, after=after, limit=limit + 1, newest_first=True
            )
        except JobNotFound:
            raise no_job(job) from None
        return JSONResponse(page_of([event_object(known, event) for event in found], limit))

    async def checkpoints(self, request: Request) -> Response:
        """Lists a page of checkpoints."""
        limit = limit_of(request, 10, _MOST)
        job = await _found(self._context.client_for(request), request)
        found = [checkpoint_object(job, each) for each in reversed(job.checkpoints)]
        ids = [each["id"] for each in found]
        after = request.query_params.get("after")
        if after is not None:
            if after not in ids:
                text = f"No such checkpoint: {after[:100]}"
                raise ApiError(404, text, param="after", code="checkpoint_not_found")
            found = found[ids.index(after) + 1 :]
        return JSONResponse(page_of(found, limit))


async def _create(
    client: AsyncClient, order: FineTuningOrder, base: str, idempotency_key: str
) -> TrainingJob:
    """Creates the job on the server. Raises ApiError."""
    key = new_key(idempotency_key)
    labels = JobLabels(
        model_id(base, order.suffix, key),
        order.suffix,
        order.training_file,
        order.validation_file or "",
        order.metadata,
    ).written()
    data = _named(order.training_file, "training_file")
    evaluation = order.validation_file
    try:
        return await client.training.create(
            adapter_name(order.suffix, key),
            data_id=data,
            eval_data_id=_named(evaluation, "validation_file") if evaluation else "",
            request_id=idempotency_key,
            checkpoints=True,
            labels=labels,
            **order.options(),  # type: ignore[misc]
        )
    except LoraplexError as error:
        raise errors.of(error, order.params) from None


def _named(file: str, param: str) -> str:
    """The server's id of a file that a job names. Raises ApiError (400)."""
    try:
        return data_id(file, param)
    except ApiError as error:
        raise ApiError(400, error.message, param=param, code=error.code) from None


async def _found(client: AsyncClient, request: Request) -> TrainingJob:
    """The job that a path names. Raises ApiError (404)."""
    job = request.path_params["job"]
    try:
        return await client.training.get(server_job_id(job))
    except JobNotFound:
        raise no_job(job) from None
