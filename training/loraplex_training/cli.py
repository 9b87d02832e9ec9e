"""The commands of `loraplex-train`: run, resume, inspect, plan, methods, shapes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from loraplex_model.base.process import core_dumps
from loraplex_model.base.refusal import BASE_MODEL_REASONS, Reason, Refusal
from loraplex_model.base.terminal import adapt_output
from rich.console import Console

from loraplex_training.publish import target
from loraplex_training.report.events import Failed
from loraplex_training.report.lines import STDOUT, opened
from loraplex_training.spec import fields
from loraplex_training.spec import parse as options
from loraplex_training.spec.flags import BASE_FLAGS, DATA_FLAGS, with_flags

app = typer.Typer(
    help="Train adapters on the NF4 base model that serves them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class TrainerExit(IntEnum):
    """Exit codes. Death by signal n is 128 + n, as in a shell."""

    OK = 0
    FAILED = 1
    """The machine or training failed: out of memory, a full disk, a loss that diverged."""
    BAD_INPUT = 2
    """The caller can correct it: options, data, another base model than the checkpoint's."""


_CALLERS: Final = BASE_MODEL_REASONS | {
    Reason.CONFIG_INVALID,
    Reason.DATA_INVALID,
    Reason.METHOD_INVALID,
    Reason.BASE_MISMATCH,
    Reason.CHECKPOINT_INVALID,
}
"""Reasons that end with BAD_INPUT."""


_in_method = partial(typer.Option, rich_help_panel="Method")
_in_output = partial(typer.Option, rich_help_panel="Output")

Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with the run's jobs. Flags override its values."),
]
Set = Annotated[
    list[str] | None,
    _in_method("--set", metavar="KEY=VALUE", help="Option of the method. May be repeated."),
]
Sweep = Annotated[
    list[str] | None,
    _in_method(
        "--sweep",
        metavar="KEY=A,B ...",
        help="Train one job per combination of values, in one pass: --sweep r=4,16 lr=1e-4,3e-4.",
    ),
]
More = Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)]
StoreDir = Annotated[
    Path | None,
    _in_output("--store", help="Directory of the store that registers the adapters."),
]
StoreUrl = Annotated[
    str,
    _in_output(
        "--store-url",
        envvar="LORAPLEX_STORE_URL",
        help="Database URL of a store that several servers share.",
    ),
]
Alias = Annotated[
    str,
    _in_output("--alias", help="Alias to point to the adapter; with several, to the best one."),
]
Label = Annotated[
    list[str] | None,
    _in_output(
        "--label", metavar="KEY=VALUE", help="Label of the registered adapters. May be repeated."
    ),
]
Serve = Annotated[
    str,
    _in_output(
        "--serve",
        metavar="HOST:PORT",
        help="Running server to upload the adapters to; it loads them and answers an example.",
    ),
]
SaveDtype = Annotated[
    str,
    _in_output("--save-dtype", help="Data type of the saved tensors: float32 or bfloat16."),
]
Events = Annotated[
    str,
    _in_output(
        "--events",
        metavar="FILE|-",
        help="File to append every event to as a line of JSON. - is standard output.",
    ),
]


@app.command()
@with_flags()
def run(
    *,
    flags: dict[str, str | list[str]],
    config: Config = None,
    set_: Set = None,
    sweep: Sweep = None,
    more: More = None,
    store: StoreDir = None,
    store_url: StoreUrl = "",
    alias: Alias = "",
    label: Label = None,
    serve: Serve = "",
    save_dtype: SaveDtype = "float32",
    events: Events = "",
) -> None:
    """Train adapters, one or several in one pass over the base model, and publish them."""
    with errors(events):
        spec = options.read(flags, pairs("--set", set_), swept(sweep, more), config)
        from loraplex_training import session

        where = target.read(store, store_url, alias, pairs("--label", label), serve, save_dtype)
        raise typer.Exit(session.start(spec, where, events))


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the run.")],
    events: Events = "",
) -> None:
    """Continue a run from its last checkpoint and publish its adapters as first requested."""
    with errors(events):
        from loraplex_training import session

        raise typer.Exit(session.resume(folder, events))


@app.command()
@with_flags((*DATA_FLAGS, *BASE_FLAGS))
def inspect(
    *,
    flags: dict[str, str | list[str]],
    count: Annotated[
        int, typer.Option("--count", min=1, help="Number of training and of evaluation examples.")
    ] = 3,
) -> None:
    """Show the examples as the model sees them: tokens, learned ones in colour, and counts."""
    with errors():
        spec = options.read({"name": "inspect", **flags})
        from loraplex_training.run import plan as reports

        reports.inspect(spec, Console(highlight=False), count)


@app.command()
@with_flags()
def plan(
    *,
    flags: dict[str, str | list[str]],
    config: Config = None,
    set_: Set = None,
    sweep: Sweep = None,
    more: More = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as one line of JSON.")
    ] = False,
) -> None:
    """Estimate the memory, steps, tokens and time of a run without training."""
    with errors(STDOUT if as_json else ""):
        spec = options.read(flags, pairs("--set", set_), swept(sweep, more), config)
        from loraplex_training.run import plan as reports

        reports.plan(spec, Console(highlight=False), as_json)


@app.command()
def methods() -> None:
    """List the adapter methods and their options."""
    from loraplex_training.run import plan as reports

    reports.methods(Console(highlight=False))


@app.command()
def shapes() -> None:
    """Print the shapes of examples that are taken, as Markdown."""
    from loraplex_training.data.shapes import table

    print(table.markdown())


def pairs(flag: str, texts: list[str] | None) -> dict[str, str]:
    """Splits texts of the form KEY=VALUE. Raises Refusal(CONFIG_INVALID)."""
    found, wrong = {}, []
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            wrong.append(f"{flag} {text}: it should read like KEY=VALUE")
        found[key] = value
    if wrong:
        raise Refusal.listing(Reason.CONFIG_INVALID, wrong)
    return found


def swept(sweep: list[str] | None, more: list[str] | None) -> list[str]:
    """The values of --sweep, which further words belong to. Raises Refusal(CONFIG_INVALID)."""
    if more and not sweep:
        raise Refusal.listing(
            Reason.CONFIG_INVALID, (f"{word}: unexpected argument" for word in more)
        )
    return [*(sweep or ()), *(more or ())]


@contextmanager
def errors(events: str = "") -> Iterator[None]:
    """Reports a refusal and exits with its code.

    Every problem is printed on standard error, for people. For programs, `Failed` is added to the
    event lines, wherever `events` says that they go.
    """
    try:
        yield
    except Refusal as error:
        for problem in error.problems:
            reason = problem.reason or error.reason
            typer.echo(f"error: {reason}: {fields.located(problem)}", err=True)
        with suppress(Refusal):
            if events:
                with opened(events) as file:
                    file.on(Failed(error.reason, tuple(error.problems)))
        bad_input = error.reason in _CALLERS
        raise typer.Exit(TrainerExit.BAD_INPUT if bad_input else TrainerExit.FAILED) from None
    except KeyboardInterrupt:  # before there was a run that could be saved
        raise typer.Exit(128 + signal.SIGINT) from None


def main() -> None:
    """The console script."""
    adapt_output()
    if not core_dumps.allowed(os.environ):
        core_dumps.forbid_core_dumps()
    app()


if __name__ == "__main__":
    main()
