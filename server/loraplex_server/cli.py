"""`loraplex-server`: serve, doctor, version, and what works without a server."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from loraplex_server import app as server
from loraplex_server import doctor, export_cli, formats, logs, store_cli
from loraplex_server.config import Config, ConfigError, load

app = typer.Typer(
    help="Serve one NF4 base model and many LoRA adapters over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _settings_flags(command: Callable[[Path | None, dict[str, Any]], None]) -> Callable[..., None]:
    """A command with `--config` and one flag per setting; it gets the file and the flags given."""

    def run(config: Path | None = None, **flags: Any) -> None:
        command(config, {name: value for name, value in flags.items() if value is not None})

    file = Annotated[
        Path | None,
        typer.Option("--config", help="A TOML file with settings, named as the flags are."),
    ]
    parameters = [_parameter("config", file)]
    for name, field in Config.model_fields.items():
        if not field.repr:
            continue
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            kind: Any = bool | None
            metavar = None
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        else:
            kind = str | None
            metavar = _metavar(field.annotation)
        text = f"{field.description} (default: {field.default})"
        option = typer.Option(flag, help=text, metavar=metavar)
        parameters.append(_parameter(name, Annotated[kind, option]))
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is not None:  # a Literal
        return "|".join(str(choice) for choice in annotation.__args__)
    names = {"Path": "PATH", "int": "N", "float": "SECONDS", "ByteSize": "BYTES"}
    return names.get(getattr(annotation, "__name__", ""), "TEXT")


def _load(file: Path | None, flags: dict[str, Any]) -> Config:
    try:
        return load(file, flags)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(server.ExitCode.BAD_CONFIG) from None


def serve(file: Path | None, flags: dict[str, Any]) -> None:
    """Load the base model and serve until SIGTERM."""
    config = _load(file, flags)
    logs.configure(config.log_format, config.log_level)
    raise typer.Exit(asyncio.run(server.run(config)))


def examine(file: Path | None, flags: dict[str, Any]) -> None:
    """Say what this machine can do and what the server would use; exit 1 if it could not serve."""
    healthy = True
    for finding in doctor.examine(_load(file, flags)):
        mark = "ok" if finding.good else "!!"
        typer.echo(f"{mark}  {finding.subject:<12} {finding.text}")
        healthy &= finding.good
    raise typer.Exit(0 if healthy else 1)


app.command("serve")(_settings_flags(serve))
app.command("doctor")(_settings_flags(examine))
formats.add_commands(app)
export_cli.add_commands(app)
app.add_typer(store_cli.app, name="store")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"loraplex-server {installed('loraplex')} (Python {sys.version.split()[0]})")


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
