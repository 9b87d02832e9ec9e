"""The flags of `loraplex-train`, made from the options in `spec`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer

from loraplex_training.spec.parse import KEYS, RUN_KEYS, Key

DATA_FLAGS: Final = ("data", "eval_data", "eval_fraction", "max_length", "learn", "system")
BASE_FLAGS: Final = ("model", "cache")


def with_flags(
    names: Collection[str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds a flag for each option, or for each of `names`.

    The decorated function gets `flags`: the options that were given, with their values as text.
    """
    keys = {name: key for name, key in {**KEYS, **RUN_KEYS}.items() if name != "options"}
    chosen = {name: key for name, key in keys.items() if names is None or name in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            *(_parameter(name, key) for name, key in chosen.items()),
            *(parameter for parameter in own if parameter.name != "flags"),
        ]

        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in chosen}
            texts = {name: str(value) for name, value in given.items() if value is not None}
            command(flags=texts, **arguments)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(name: str, key: Key) -> inspect.Parameter:
    flag, kind = "--" + name.replace("_", "-"), key.info.annotation
    extra = key.info.json_schema_extra
    assert isinstance(extra, dict), "every option names its panel"
    help_ = f"{key.info.description}{_default(key.default)}"
    panel = str(extra["panel"])
    if kind is bool:
        both = f"{flag}/--no-{flag.removeprefix('--')}"
        annotation: Any = Annotated[
            bool | None, typer.Option(both, help=help_, rich_help_panel=panel)
        ]
    else:
        metavar = {int: "N", float: "X"}.get(kind) or (
            "PATH" if Path in (kind, *get_args(kind)) else "TEXT"
        )
        annotation = Annotated[
            str | None, typer.Option(flag, help=help_, metavar=metavar, rich_help_panel=panel)
        ]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _default(value: object) -> str:
    """The default in brackets; nothing for a flag that is off and for an option that is empty."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    shown = isinstance(value, int | float | str | Path) and value is not False and value != ""
    return f" (default: {value})" if shown else ""
