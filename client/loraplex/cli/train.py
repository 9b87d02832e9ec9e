"""`loraplex train`: have the server train adapters, and see how far it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loraplex import channel
from loraplex.cli import options, output, training_output
from loraplex.cli.session import ExitCode, session
from loraplex.client import Client
from loraplex.training import JobState, TrainingJob, TrainingOptions

app = typer.Typer(name="train", help="Have the server train adapters.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="From `loraplex train create`.")]

_SERVED = "The path of DATA is on the server, below its import root."


@app.command("create")
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to register it as.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A JSONL file of this machine: 3 MiB at most.")
    ],
    on_server: Annotated[bool, typer.Option("--on-server", help=_SERVED)] = False,
    eval_data: Annotated[
        str, typer.Option(metavar="FILE", help="What it is evaluated on; where DATA is.")
    ] = "",
    method: Annotated[str | None, typer.Option(help="Default: lora.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeat it."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of a micro-batch.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches of a step.")] = None,
    pack: Annotated[bool | None, typer.Option(help="Let short examples share a row.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example.")] = None,
    optimiser: Annotated[str | None, typer.Option(help="Default: adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the learning rate.")] = None,
    learn: Annotated[
        str | None, typer.Option(metavar="WHAT", help="auto, completion, assistant or all.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without a better one before it stops.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="exact, json or regex:EXPRESSION, on generated answers.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of order and initial values.")] = None,
    replace: options.Replace = False,
    load: options.LoadNow = False,
    alias: Annotated[str | None, typer.Option(help="An alias to point to it.")] = None,
    label: options.Labels = None,
    request_id: Annotated[
        str, typer.Option(metavar="ID", help="The same ID is the same job, however often.")
    ] = "",
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow it to its end; exit with 6 if it fails.")
    ] = False,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Queue the training of an adapter NAME on the examples of DATA."""
    chosen: TrainingOptions = {
        "method": method,
        "options": _pairs(set_ or ()),
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "pack": pack,
        "max_length": max_length,
        "optimiser": optimiser,
        "learning_rate": lr,
        "schedule": schedule,
        "learn": learn,
        "eval_every": eval_every,
        "patience": patience,
        "metric": metric,
        "seed": seed,
        "replace": replace,
        "load": load,
        "alias": alias,
        "labels": options.parse_labels(label or ()),
    }
    with session(ctx, server, timeout) as client:
        job = client.training.create(
            name,
            None if on_server else Path(data),
            server_path=data if on_server else "",
            eval_data=Path(eval_data) if eval_data and not on_server else None,
            eval_server_path=eval_data if on_server else "",
            request_id=request_id,
            timeout=timeout,
            **chosen,
        )
        if watch:
            _follow(client, job, as_json)
        elif as_json:
            output.write_json(job)
        else:
            print(job.job_id)
            output.note(f"{job.state}; follow it with: loraplex train watch {job.job_id}")


@app.command("get")
def get(
    ctx: typer.Context,
    job_id: JobId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Describe one job."""
    with session(ctx, server, timeout) as client:
        found = client.training.get(job_id)
    if as_json:
        output.write_json(found)
    else:
        training_output.write_job(found)


@app.command("list")
def list_(
    ctx: typer.Context,
    state: Annotated[
        list[JobState] | None, typer.Option("--state", help="Only such jobs; repeat it.")
    ] = None,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """List the jobs that the server remembers, the newest first."""
    with session(ctx, server, timeout) as client:
        found = client.training.list(states=state or ())
    if as_json:
        output.write_json(found)
    elif found:
        training_output.write_jobs(found)
    else:
        output.note("no training jobs; begin one with: loraplex train create NAME DATA")


@app.command("cancel")
def cancel(
    ctx: typer.Context,
    job_id: JobId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """End a job, and wait until it has ended."""
    with session(ctx, server, timeout) as client:
        done = client.training.cancel(job_id)
    if as_json:
        output.write_json(done)
    else:
        print(done.job_id, done.state)


@app.command("watch")
def watch(
    ctx: typer.Context,
    job_id: JobId,
    as_json: options.Json = False,
    server: options.Server = None,
) -> None:
    """Follow a job to its end. Exits with 6 if it fails or is cancelled; Ctrl-C leaves it alone."""
    with session(ctx, server, channel.DEFAULT_TIMEOUT) as client:
        _follow(client, client.training.get(job_id), as_json)


def _follow(client: Client, job: TrainingJob, as_json: bool) -> None:
    """Shows every state that comes. Raises Exit(REFUSED) where no adapter comes of it."""
    with (
        client.training.watch(job.job_id) as states,
        training_output.following(as_json) as show,
    ):
        for job in states:
            show(job)
    if not as_json:
        training_output.write_end(job)
        sys.stdout.flush()
    if job.state is not JobState.SUCCEEDED:
        raise typer.Exit(ExitCode.REFUSED)


def _pairs(terms: list[str] | tuple[()]) -> dict[str, object]:
    """`["r=16", "bias=none"]` as a mapping. Raises BadParameter."""
    found: dict[str, object] = {}
    for term in terms:
        key, given, value = term.partition("=")
        if not key or not given or key in found:
            raise typer.BadParameter(f"{term!r}: it should read KEY=VALUE, one for each key")
        found[key] = value
    return found
