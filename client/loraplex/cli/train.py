"""`loraplex train`: training jobs on the server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli import options, output, train_data, training_output
from loraplex.cli.command import command
from loraplex.cli.options import option
from loraplex.cli.session import ExitStatus, Session
from loraplex.training import JobState, TrainingJob, TrainingOptions

app = typer.Typer(name="train", help="Train adapters on the server.", no_args_is_help=True)

app.add_typer(train_data.app)

JobId = Annotated[
    str, typer.Argument(metavar="JOB", help="Job id, as printed by `loraplex train create`.")
]


_JOB: Mapping[str, Any] = {
    "method": option("Method", "Training method. Default: lora."),
    "epochs": option("Training", "Number of passes over the data."),
    "steps": option("Training", "Number of optimiser steps, instead of --epochs."),
    "batch_size": option("Training", "Examples per micro-batch."),
    "accumulation": option("Training", "Micro-batches per optimiser step."),
    "pack": option("Training", "Put several short examples into one row."),
    "max_length": option("Training", "Tokens per example; longer examples are cut."),
    "learn": option(
        "Training", "Tokens to learn: auto, completion, assistant or all.", metavar="WHAT"
    ),
    "seed": option("Training", "Random seed for example order and initialisation."),
    "optimiser": option("Optimiser", "Optimiser. Default: adamw."),
    "learning_rate": option("Optimiser", "Learning rate.", "--lr"),
    "schedule": option("Optimiser", "Learning-rate schedule, such as constant, linear or cosine."),
    "eval_every": option("Evaluation", "Optimiser steps between evaluations."),
    "patience": option("Evaluation", "Stop after this many evaluations without improvement."),
    "metric": option("Evaluation", "Metric on generated answers: exact, json or regex:EXPRESSION."),
    "replace": option("Registration", "Move a name that is taken to the new adapter.", "--replace"),
    "load": option("Registration", "Load the adapter onto the device when it is ready.", "--load"),
    "alias": option("Registration", "Point this alias to the new adapter."),
    "checkpoints": option(
        "Registration", "Register it at every evaluation, too, as NAME-step-N.", "--checkpoints"
    ),
}
"""The keys of TrainingOptions that are options of `create`."""


@command(app, "create")
def create(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to register the adapter as.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="File of examples: JSON lines, JSON or CSV. At most 3 MiB if it is a local file; "
            "`loraplex train data upload` stores larger ones.",
        ),
    ],
    *,
    on_server: Annotated[
        bool, option("Data", "Read DATA on the server, below its import root.", "--on-server")
    ] = False,
    uploaded: Annotated[
        bool, option("Data", "DATA is the id of a file that was uploaded.", "--uploaded")
    ] = False,
    eval_data: Annotated[
        str, option("Data", "Evaluation data, in the same place as DATA.", metavar="FILE")
    ] = "",
    given: Annotated[TrainingOptions, _JOB],
    set_: Annotated[
        list[str] | None,
        option(
            "Method",
            "Option of the training method. Can be repeated.",
            "--set",
            metavar="KEY=VALUE",
        ),
    ] = None,
    label: options.Labels = None,
    request_id: Annotated[
        str, option("Job", "Id that makes repeated calls create only one job.", metavar="ID")
    ] = "",
    watch: Annotated[
        bool, option("Job", "Follow the job to its end; exit with 6 if it fails.", "--watch")
    ] = False,
) -> None:
    """Queue a job that trains an adapter NAME on the examples in DATA."""
    chosen: TrainingOptions = {
        **given,
        "options": options.parse_pairs(set_),
        "labels": options.parse_pairs(label),
    }
    job = session.client.training.create(
        name,
        **_sources(data, eval_data, on_server, uploaded),
        request_id=request_id,
        timeout=session.timeout,
        **chosen,
    )
    if watch:
        _follow(session, job)
    else:
        session.show(job, training_output.write_queued)


def _sources(data: str, eval_data: str, on_server: bool, uploaded: bool) -> dict[str, Any]:
    """Returns the arguments of `create` that say where the examples are."""
    if on_server and uploaded:
        raise typer.BadParameter("give either --on-server or --uploaded")
    if on_server:
        return {"server_path": data, "eval_server_path": eval_data}
    if uploaded:
        return {"data_id": data, "eval_data_id": eval_data}
    return {"data": Path(data), "eval_data": Path(eval_data) if eval_data else None}


@command(app, "get")
def get(session: Session, job_id: JobId) -> None:
    """Describe one job."""
    session.show(session.client.training.get(job_id), training_output.write_job)


@command(app, "list")
def list_(
    session: Session,
    state: Annotated[
        list[JobState] | None,
        option("Filter", "List only jobs in this state. Can be repeated.", "--state"),
    ] = None,
) -> None:
    """List the jobs that the server remembers, the newest first."""
    found = session.client.training.list(states=state or ())
    if found or session.as_json:
        session.show(found, training_output.write_jobs)
    else:
        output.note("no training jobs; start one with: loraplex train create NAME DATA")


@command(app, "events")
def events(
    session: Session,
    job_id: JobId,
    limit: Annotated[
        int, option("Filter", "Number of events to show, the latest; 0 shows all.", min=0)
    ] = 0,
) -> None:
    """List what happened to a job, the oldest event first."""
    found = session.client.training.events(job_id, limit=limit, newest_first=bool(limit))
    if limit:
        found.reverse()
    session.show(found, training_output.write_events)


@command(app, "cancel")
def cancel(session: Session, job_id: JobId) -> None:
    """Cancel a job and wait until it has ended."""
    done = session.client.training.cancel(job_id)
    session.show(done, lambda job: print(job.job_id, job.state))


@command(app, "watch", timeout=None)
def watch(session: Session, job_id: JobId) -> None:
    """Follow a job to its end. Ctrl-C leaves the job running.

    Exits with 6 if the job fails or is cancelled.
    """
    _follow(session, session.client.training.get(job_id))


def _follow(session: Session, job: TrainingJob) -> None:
    """Shows every state of a job. Raises Exit(REFUSED) if it ends without an adapter."""
    with (
        session.client.training.watch(job.job_id) as states,
        training_output.following(session.as_json) as show,
    ):
        for job in states:
            show(job)
    if not session.as_json:
        training_output.write_end(job)
        sys.stdout.flush()
    if job.state is not JobState.SUCCEEDED:
        raise typer.Exit(ExitStatus.REFUSED)
