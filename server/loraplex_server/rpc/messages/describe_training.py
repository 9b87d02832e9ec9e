"""Converts training jobs between the API's messages and the queue's values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from loraplex.v1 import training_pb2
from loraplex_model.base.refusal import Problem, Reason

from loraplex_server.access.principals import Principal
from loraplex_server.access.rules import labels_of_new, require_name
from loraplex_server.training.files.record import DataFileRecord
from loraplex_server.training.history.events import JobEventRecord
from loraplex_server.training.jobs import (
    CheckpointRecord,
    EvaluationRecord,
    JobOrder,
    JobRecord,
    ProgressRecord,
    Scalar,
    State,
)
from loraplex_server.training.request import DataSource, JobRequest


def _options(message: type[Message], *others: str) -> Mapping[str, str]:
    names = [field for field in message.DESCRIPTOR.fields_by_name if field not in others]
    return {name: "lr" if name == "learning_rate" else name for name in names}


_SPEC: Final = _options(training_pb2.TrainingSpec, "name", "method", "optimiser")
_OPTIMISER: Final = _options(training_pb2.TrainingOptimiser, "name")
"""Fields of the API with the trainer's keys for them."""

PATHS: Final[Mapping[str, str]] = {
    "name": "spec.name",
    "method": "spec.method.name",
    "options": "spec.method.options",
    "optimiser": "spec.optimiser.name",
    "data": "data",
    "eval_data": "eval_data",
    **{key: f"spec.{field}" for field, key in _SPEC.items()},
    **{key: f"spec.optimiser.{field}" for field, key in _OPTIMISER.items()},
}
"""Paths in CreateJobRequest by the trainer's key of a job."""

_FALLBACKS: Final[Mapping[Reason | None, str]] = {
    Reason.CONFIG_INVALID: "spec",
    Reason.METHOD_INVALID: "spec.method",
    Reason.DATA_INVALID: "data",
}
"""Paths in CreateJobRequest for problems that name no key of a job, by the trainer's reason."""

_STATE: Final = "TRAINING_JOB_STATE_"


def path(problem: Problem) -> str:
    """Returns the path in CreateJobRequest for a problem with the trainer's or the API's field.

    The trainer's fields are `jobs.NAME.KEY`, `jobs.NAME.method.OPTION` or a KEY of all jobs.
    """
    if problem.reason not in _FALLBACKS:
        return problem.field
    key = problem.field
    if key.startswith("jobs."):
        key = key.removeprefix("jobs.").partition(".")[2]
    key, _, option = key.partition(".")
    if key == "method" and option:
        return f"spec.method.options[{option}]"
    return PATHS.get(key, _FALLBACKS[problem.reason])


def request(message: training_pb2.CreateJobRequest, principal: Principal) -> JobRequest:
    """Returns the order of a valid request. Raises Refusal(PERMISSION_DENIED)."""
    spec, delivery = message.spec, message.delivery
    settings: dict[str, Scalar] = dict(_given(spec, _SPEC))
    settings |= _given(spec.optimiser, _OPTIMISER)
    if spec.optimiser.name:
        settings["optimiser"] = spec.optimiser.name
    order = JobOrder(
        name=spec.name,
        method=spec.method.name or "lora",
        options=dict(spec.method.options),
        settings=settings,
        replace=delivery.replace,
        load=delivery.load,
        alias=delivery.alias,
        labels=labels_of_new(principal, delivery.labels),
        checkpoints=delivery.checkpoints,
    )
    for name in filter(None, (order.name, order.alias)):
        require_name(principal, name)
    data, evaluation = (
        DataSource(given.jsonl, given.path, given.data_id)
        for given in (message.data, message.eval_data)
    )
    has_evaluation = message.HasField("eval_data")
    evaluation_given = evaluation if has_evaluation else None
    return JobRequest(order, data, evaluation_given, message.request_id, principal)


def job(found: JobRecord, position: int) -> training_pb2.TrainingJob:
    """Returns the message for a job with `position` jobs before it in the queue."""
    order = found.order
    return training_pb2.TrainingJob(
        job_id=found.id,
        state=f"{_STATE}{found.state.name}",
        spec=_spec(order),
        delivery=training_pb2.TrainingDelivery(
            replace=order.replace,
            load=order.load,
            alias=order.alias,
            labels=order.labels,
            checkpoints=order.checkpoints,
        ),
        queue_position=position,
        resumptions=found.resumptions,
        estimated_bytes=found.estimated_bytes,
        create_time=_time(found.created),
        start_time=_time(found.started),
        end_time=_time(found.ended),
        progress=None if found.progress is None else _progress(found.progress),
        result=_result(found),
        error=None
        if found.error is None
        else training_pb2.TrainingError(**msgspec.structs.asdict(found.error)),
        checkpoints=map(_checkpoint, found.checkpoints),
        trained_tokens=found.trained_tokens,
    )


def event(found: JobEventRecord) -> training_pb2.JobEvent:
    """Returns the message for an event of a job."""
    message = training_pb2.JobEvent(
        number=found.number,
        time=_time(found.time),
        state=None if found.state is None else f"{_STATE}{found.state.name}",
    )
    if found.state is not None:
        return message
    if found.progress is not None:
        message.progress.CopyFrom(_progress(found.progress))
    elif found.evaluation is not None:
        message.evaluation.CopyFrom(_evaluation(found.evaluation))
    elif found.checkpoint is not None:
        message.checkpoint.CopyFrom(_checkpoint(found.checkpoint))
    elif found.samples is not None:
        message.samples.step = found.samples.step
        for sample in found.samples.samples:
            message.samples.samples.add(**msgspec.structs.asdict(sample))
    else:
        message.message = found.message
    return message


def file(found: DataFileRecord) -> training_pb2.DataFile:
    """Returns the message for an uploaded file."""
    return training_pb2.DataFile(
        data_id=found.id,
        filename=found.filename,
        size_bytes=found.size,
        digest=found.digest,
        create_time=_time(found.created),
        labels=found.labels,
    )


def _checkpoint(found: CheckpointRecord) -> training_pb2.TrainingCheckpoint:
    return training_pb2.TrainingCheckpoint(
        step=found.step,
        adapter_id=f"{found.name}@{found.version}",
        digest=found.digest,
        time=_time(found.time),
        evaluation=None if found.evaluation is None else _evaluation(found.evaluation),
        loss=found.loss,
    )


def _result(found: JobRecord) -> training_pb2.TrainingResult | None:
    if found.result is None:
        return None
    result = msgspec.structs.asdict(found.result)
    return training_pb2.TrainingResult(ending=found.ending, peak_bytes=found.peak_bytes, **result)


def states(message: training_pb2.ListJobsRequest) -> frozenset[State]:
    """Returns the states that a valid request selects; none selects all."""
    name = training_pb2.TrainingJobState.Name
    return frozenset(State[name(state).removeprefix(_STATE)] for state in message.states)


def _given(message: Any, names: Mapping[str, str]) -> Iterator[tuple[str, Scalar]]:
    for field, key in names.items():
        if message.HasField(field):
            yield key, getattr(message, field)


def _spec(order: JobOrder) -> training_pb2.TrainingSpec:
    given = order.settings
    optimiser = {field: given[key] for field, key in _OPTIMISER.items() if key in given}
    spec: dict[str, Any] = {field: given[key] for field, key in _SPEC.items() if key in given}
    return training_pb2.TrainingSpec(
        name=order.name,
        method=training_pb2.TrainingMethod(name=order.method, options=order.options),
        optimiser={"name": given.get("optimiser", ""), **optimiser},
        **spec,
    )


def _progress(now: ProgressRecord) -> training_pb2.TrainingProgress:
    message = training_pb2.TrainingProgress(
        step=now.step,
        steps=now.steps,
        loss=now.loss,
        learning_rate=now.rate,
        gradient_norm=_number(now.norm),
        tokens_per_second=now.tokens_per_second,
        evaluation=None if now.evaluation is None else _evaluation(now.evaluation),
        best_evaluation=None if now.best is None else _evaluation(now.best),
        saved_step=now.saved_step,
    )
    if now.remaining is not None and math.isfinite(now.remaining):
        message.remaining.FromMilliseconds(round(now.remaining * 1000))
    return message


def _evaluation(found: EvaluationRecord) -> training_pb2.TrainingEvaluation:
    return training_pb2.TrainingEvaluation(
        step=found.step,
        loss=_number(found.loss),
        perplexity=_number(found.perplexity),
        metric=found.metric,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _time(seconds: float) -> Timestamp | None:
    """Returns a Unix time as a message; None for 0, which is no time."""
    if not seconds:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
