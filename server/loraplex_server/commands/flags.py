"""Command-line flags made from the settings, so that every command offers them alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, get_origin, get_type_hints

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from loraplex_server.config import Config
from loraplex_server.config_sources import ConfigError, load
from loraplex_server.exits import ServerExit
from loraplex_server.former_settings import FORMER
from loraplex_server.settings import PANELS

ALL_SETTINGS: Final = tuple(name for name, field in Config.model_fields.items() if field.repr)

_FILE: Final = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file with settings, named as the flags but with underscores."
    ),
]


def with_settings(
    run: Callable[..., None], names: Sequence[str], own: Sequence[inspect.Parameter] | None = None
) -> Callable[..., None]:
    """A Typer command with `--config`, a flag for each named setting, and the parameters `own`.

    `run` is called with the resulting `Config` and the values of `own`, by default the parameters
    of `run` after its first. Wrong settings end the command with exit code BAD_CONFIG.
    """

    former = [name for name, now in FORMER.items() if now in names]

    def command(config: Path | None = None, **given: Any) -> None:
        flags = {name: given.pop(name) for name in (*names, *former)}
        try:
            settings = load(config, {k: value for k, value in flags.items() if value is not None})
        except ConfigError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(ServerExit.BAD_CONFIG) from None
        run(settings, **given)

    if own is None:
        own = own_parameters(run)
    parameters = [*own, parameter("config", _FILE), *map(_setting, names), *map(_former, former)]
    command.__doc__ = run.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def own_parameters(work: Callable[..., None]) -> list[inspect.Parameter]:
    """The parameters of `work` after its first, with evaluated annotations."""
    hints = get_type_hints(work, include_extras=True)
    found = list(inspect.signature(work).parameters.values())[1:]
    return [each.replace(annotation=hints[each.name]) for each in found]


def parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """A keyword parameter, which Typer turns into an option."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _setting(name: str) -> inspect.Parameter:
    field = Config.model_fields[name]
    kind: Any = str | None
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        kind, flag = bool | None, f"{flag}/--no-{flag.removeprefix('--')}"
    option = typer.Option(
        flag, help=_help(field), metavar=_metavar(field.annotation), rich_help_panel=_panel(name)
    )
    return parameter(name, Annotated[kind, option])


def _former(name: str) -> inspect.Parameter:
    """A hidden flag for a setting of an earlier version, which is refused with its new name."""
    flag = name.replace("_", "-")
    option = typer.Option(f"--{flag}/--no-{flag}", hidden=True)
    return parameter(name, Annotated[bool | None, option])


def _panel(name: str) -> str:
    before = ALL_SETTINGS[: ALL_SETTINGS.index(name) + 1]
    return next(PANELS[each] for each in reversed(before) if each in PANELS)


def _help(field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, ByteSize) and default:
        default = default.human_readable().replace(".0", "")
    text = (field.description or "").replace("\n", " ")
    return f"{text} (default: {default})" if str(default) else text


def _metavar(annotation: Any) -> str | None:
    if annotation is bool:
        return None
    if get_origin(annotation) is not None:  # a Literal
        return "|".join(str(choice) for choice in annotation.__args__)
    names = {"Path": "PATH", "int": "N", "float": "SECONDS", "ByteSize": "BYTES"}
    return names.get(getattr(annotation, "__name__", ""), "TEXT")
