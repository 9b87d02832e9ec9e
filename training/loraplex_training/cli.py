"""`loraplex-train`: run, resume, inspect, plan, methods."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from loraplex_model.base.refusal import BASE_MODEL_REASONS, Reason, Refusal
from rich.console import Console

from loraplex_training.publish import target
from loraplex_training.spec import parse as options
from loraplex_training.spec.flags import BASE_FLAGS, DATA_FLAGS, with_flags

app = typer.Typer(
    help="Train adapters on the NF4 base that serves them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ExitCode(IntEnum):
    """Beside 128 + n for signal n."""

    OK = 0
    FAILED = 1
    """The machine's fault, or training's: out of memory, a full disk, a loss that diverged."""
    BAD_INPUT = 2
    """Options, data, a base that is not the checkpoint's: the caller can mend it."""


_CALLERS: Final = BASE_MODEL_REASONS | {
    Reason.CONFIG_INVALID,
    Reason.DATA_INVALID,
    Reason.METHOD_INVALID,
    Reason.BASE_MISMATCH,
    Reason.CHECKPOINT_INVALID,
}

Config = Annotated[
    Path | None,
    typer.Option("--config", help="A TOML file with jobs; flags go before what it says."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; again for more."),
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=A,B ...",
        help="Train one job for each combination, in one pass: --sweep r=4,16 lr=1e-4,3e-4.",
    ),
]
More = Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)]
StoreDir = Annotated[
    Path | None, typer.Option("--store", help="Register the adapters in this store.")
]
StoreUrl = Annotated[
    str,
    typer.Option("--store-url", envvar="LORAPLEX_STORE_URL", help="A shared store's database."),
]
Alias = Annotated[
    str, typer.Option("--alias", help="Point it to the adapter; of several to the best.")
]
Label = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Of what is registered.")
]
Serve = Annotated[
    str,
    typer.Option("--serve", metavar="HOST:PORT", help="Upload to this server, load, and ask it."),
]
SaveDtype = Annotated[
    str, typer.Option("--save-dtype", help="Of the adapter's tensors: float32 or bfloat16.")
]
Events = Annotated[
    str,
    typer.Option(
        "--events", metavar="FILE|-", help="Write every event there as a line of JSON; - is stdout."
    ),
]


@app.command()
@with_flags()
def run(
    *,
    flags: dict[str, str],
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
    """Train adapters, one or several in one pass over the base, and hand them over."""
    with errors():
        spec = options.read(flags, pairs("--set", set_), swept(sweep, more), config)
        from loraplex_training import session

        where = target.read(store, store_url, alias, pairs("--label", label), serve, save_dtype)
        raise typer.Exit(session.begin(spec, where, events))


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run's folder.")],
    events: Events = "",
) -> None:
    """Go on with a run from its last checkpoint, and hand over as it was told to."""
    with errors():
        from loraplex_training import session

        raise typer.Exit(session.resume(folder, events))


@app.command()
@with_flags((*DATA_FLAGS, *BASE_FLAGS))
def inspect(
    *,
    flags: dict[str, str],
    count: Annotated[int, typer.Option("--count", min=1, help="Examples of each side.")] = 3,
) -> None:
    """Show what a model is given to learn: tokens, their loss mask in colour, counts."""
    with errors():
        spec = options.read({"name": "inspect", **flags})
        from loraplex_training.run import plan as outlook

        outlook.inspect(spec, Console(highlight=False), count)


@app.command()
@with_flags()
def plan(
    *,
    flags: dict[str, str],
    config: Config = None,
    set_: Set = None,
    sweep: Sweep = None,
    more: More = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON, for programs.")
    ] = False,
) -> None:
    """Say what a run would take, in memory, steps, tokens and time, without training."""
    with errors():
        spec = options.read(flags, pairs("--set", set_), swept(sweep, more), config)
        from loraplex_training.run import plan as outlook

        outlook.plan(spec, Console(highlight=False), as_json)


@app.command()
def methods() -> None:
    """List the methods and their options."""
    from loraplex_training.run import plan as outlook

    outlook.methods(Console(highlight=False))


def pairs(flag: str, texts: list[str] | None) -> dict[str, str]:
    """KEY=VALUE, each. Raises Refusal(CONFIG_INVALID)."""
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
    """What --sweep was given; further words belong to it. Raises Refusal(CONFIG_INVALID)."""
    if more and not sweep:
        raise Refusal.listing(
            Reason.CONFIG_INVALID, (f"{word}: there is no place for it" for word in more)
        )
    return [*(sweep or ()), *(more or ())]


@contextmanager
def errors() -> Iterator[None]:
    """Says what is wrong, all of it, and exits with the code that fits."""

    try:
        yield
    except Refusal as refusal:
        fail(refusal)
    except KeyboardInterrupt:  # before there was a run that could be saved
        raise typer.Exit(128 + signal.SIGINT) from None


def fail(error: Refusal) -> NoReturn:
    """Writes every problem to standard error and exits."""
    for problem in error.problems:
        typer.echo(f"error: {error.reason}: {problem.message}", err=True)
    raise typer.Exit(ExitCode.BAD_INPUT if error.reason in _CALLERS else ExitCode.FAILED) from None


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
