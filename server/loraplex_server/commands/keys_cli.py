"""`loraplex-server keys`: commands on the file of keys, which a running server reads again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, NoReturn

import typer
from loraplex_model.base.refusal import Reason, Refusal
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraplex_server.access.identity.key_file import KeyFile
from loraplex_server.access.identity.keys import MAX_NOTE, IssuedKey, split
from loraplex_server.access.identity.principals_file import check_principal_name, read_principals
from loraplex_server.access.principals import Principal
from loraplex_server.commands.flags import own_parameters, with_settings
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit

_PIPE_COLUMNS: Final = 200
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MOST_DIGITS: Final = 8
_DURATION: Final = "a number with s, m, h, d or w, such as 90d"

app = typer.Typer(
    help="Make, list and revoke the keys of principals. Running servers notice within seconds.",
    no_args_is_help=True,
)


@dataclass(frozen=True, slots=True)
class Keyring:
    """The file of keys, and the settings of one command."""

    file: KeyFile
    config: Config

    def principals(self) -> Mapping[str, Principal] | None:
        """The principals by name; None if the setting is empty. Raises Refusal."""
        file = self.config.principals
        return None if file is None else read_principals(file).by_name


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command on the file of keys: `work` gets a `Keyring` and its own arguments."""

    def add_command(work: Callable[..., None]) -> Callable[..., None]:
        def run(config: Config, **arguments: Any) -> None:
            try:
                work(Keyring(KeyFile(config.keys), config), **arguments)
            except Refusal as refusal:
                _fail(refusal)
            except OSError as error:
                typer.echo(f"error: cannot use {config.keys}: {error.strerror}", err=True)
                raise typer.Exit(ServerExit.REFUSED) from None

        run.__doc__ = work.__doc__
        app.command(name)(with_settings(run, ("keys", "principals"), own_parameters(work)))
        return work

    return add_command


@_command("add")
def add(
    keyring: Keyring,
    principal: Annotated[str, typer.Argument(help="Principal that the key is for.")],
    *,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires",
            metavar="WHEN",
            help="When the key ends: 90d, or a date such as 2027-01-01 (UTC). Never by default.",
        ),
    ] = None,
    note: Annotated[str, typer.Option("--note", help="Words about the key, for its list.")] = "",
) -> None:
    """Make a key and print it, once: the server keeps only a hash of it."""
    if len(note) > MAX_NOTE or not note.isprintable():
        raise typer.BadParameter(
            f"at most {MAX_NOTE} characters, all of them printable", param_hint="--note"
        )
    end = None if expires is None else _end(expires, datetime.now(UTC))
    known = keyring.principals()
    if known is None:
        try:
            check_principal_name(principal)
        except ValueError as error:
            raise typer.BadParameter(f"the name of a principal {error}") from None
    elif principal not in known:
        there = ", ".join(sorted(known))
        message = f"{keyring.config.principals} has no principal {principal!r}; it has {there}"
        raise Refusal(Reason.FIELD_INVALID, message, "principal")
    key, text = keyring.file.add(principal, end, note)
    typer.echo(text)
    until = "does not expire" if key.expires is None else f"expires at {_time(key.expires)} UTC"
    typer.echo(f"key {key.id} of {principal} {until}; it is not shown again", err=True)


@_command("ls")
def ls(
    keyring: Keyring,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the keys with their states."""
    try:
        principals = keyring.principals()
    except Refusal as refusal:  # the keys can be listed all the same
        typer.echo(f"warning: {refusal.message}", err=True)
        principals = None
    now = datetime.now(UTC)
    found = sorted(keyring.file.read().values(), key=lambda key: key.created)
    if as_json:
        rows = [
            {
                **key.model_dump(mode="json", exclude={"sha256"}),
                "state": key.state(now).value,
                "principal_exists": principals is None or key.principal in principals,
            }
            for key in found
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    console.print(_table(found, principals, now) if found else "no keys")


@_command("revoke")
def revoke(
    keyring: Keyring,
    key_id: Annotated[
        str, typer.Argument(help="Id of the key: the part after lpx_. A whole key will do, too.")
    ],
) -> None:
    """Revoke a key for good. Running servers refuse it within two seconds."""
    parts = split(key_id)
    key = keyring.file.revoke(key_id if parts is None else parts[0])
    assert key.revoked is not None, "it was revoked just now"
    typer.echo(f"key {key.id} of {key.principal} was revoked at {_time(key.revoked)} UTC")


@_command("prune")
def prune(
    keyring: Keyring,
    *,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than", metavar="TIME", help="Keep keys that ended more recently than this."
        ),
    ] = "30d",
) -> None:
    """Remove keys from the list that were revoked or expired some time ago."""
    age = _duration(older_than)
    if age is None:
        raise typer.BadParameter(_DURATION, param_hint="--older-than")
    gone = keyring.file.prune(datetime.now(UTC), age)
    for key in gone:
        typer.echo(f"key {key.id} of {key.principal} was removed")
    typer.echo(f"{len(gone)} removed")


def _table(
    keys: Iterable[IssuedKey], principals: Mapping[str, Principal] | None, now: datetime
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("key", "principal", "state", "created", "expires", "note"):
        table.add_column(column, overflow="fold")
    for key in keys:
        gone = principals is not None and key.principal not in principals
        table.add_row(
            key.id,
            escape(key.principal),
            f"{key.state(now)}, no such principal" if gone else str(key.state(now)),
            _time(key.created),
            "never" if key.expires is None else _time(key.expires),
            escape(key.note),
        )
    return table


def _end(text: str, now: datetime) -> datetime:
    """The time that `--expires` names, which is after `now`. Raises BadParameter."""
    try:
        age = _duration(text)
        end = datetime.fromisoformat(text) if age is None else now + age
        if end.tzinfo is None:
            end = end.replace(tzinfo=UTC)
        end = end.astimezone(UTC).replace(microsecond=0)
    except (ValueError, OverflowError):
        message = f"{_DURATION}, or a date such as 2027-01-01"
        raise typer.BadParameter(message, param_hint="--expires") from None
    if end <= now:
        raise typer.BadParameter(f"{text} has passed", param_hint="--expires")
    return end


def _duration(text: str) -> timedelta | None:
    """A time such as "90d"; None if the text is none."""
    number, unit = text[:-1], text[-1:]
    well_formed = number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS
    if unit not in _UNITS or not well_formed:
        return None
    return timedelta(**{_UNITS[unit]: int(number)})


def _time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"


def _fail(refusal: Refusal) -> NoReturn:
    typer.echo(f"error: {refusal.message}", err=True)
    broken = refusal.reason is Reason.CONFIG_INVALID
    raise typer.Exit(ServerExit.BAD_CONFIG if broken else ServerExit.REFUSED) from None
