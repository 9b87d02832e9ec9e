"""`loraplex-server store backup` and `store recover`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from loraplex_adapters.store.backup import back_up, check_backup, recover
from loraplex_model.base.refusal import Refusal

from loraplex_server.commands import store_tables as tables
from loraplex_server.commands.flags import own_parameters, with_settings
from loraplex_server.commands.store_cli import fail, show
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit

_STORE: Final = ("store", "store_url")
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to those on the store."""
    for name, work in (("backup", backup), ("recover", recover_store)):
        app.command(name)(with_settings(_typed(work), _STORE, own_parameters(work)))


def backup(
    config: Config,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of the backup; made if it is missing.")
    ],
    *,
    as_json: _Json = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove files from the backup that no version names now."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only read the backup, and check all of it.")
    ] = False,
) -> None:
    """Back up the store to DIR, or bring the backup in DIR up to date. Servers may use the store.

    Only adapters that DIR lacks are copied. Exit 1 if files of an adapter are damaged.
    """
    if verify:
        checked = check_backup(directory)
        value = {**tables.plain(checked.manifest), "damaged": checked.damaged}
        lines = [*checked.damaged.values(), *_lost(checked.manifest.lost)]
        good = len(checked.manifest.blobs) - len(checked.damaged)
        lines.append(f"{good} adapters are intact, {len(checked.damaged)} damaged")
        show(as_json, value, "\n".join(lines))
        if checked.damaged:
            raise typer.Exit(ServerExit.REFUSED)
        return
    done = back_up(config.store, config.store_url.get_secret_value(), directory, prune=prune)
    value = {**tables.plain(done.manifest), "copied": done.copied, "pruned": done.pruned}
    size = tables.size_text(sum(done.manifest.blobs.values()))
    total = (
        f"{done.manifest.rows.get('versions', 0)} versions of {len(done.manifest.blobs)} adapters"
    )
    copied = f"{len(done.copied)} copied, {len(done.pruned)} pruned"
    show(as_json, value, "\n".join([*_lost(done.manifest.lost), f"{total}, {size}; {copied}"]))
    if done.manifest.lost:
        raise typer.Exit(ServerExit.REFUSED)


def recover_store(
    config: Config,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory that `store backup` has made.")
    ],
    *,
    as_json: _Json = False,
    damaged: Annotated[
        bool,
        typer.Option("--damaged", help="Leave out adapters whose files in DIR are damaged."),
    ] = False,
) -> None:
    """Make a new store of the backup in DIR. The store's directory and database must be empty.

    Everything is checked before anything is written. An interrupted recovery is continued by the
    same command; no server can open the store before it has ended.
    """
    url = config.store_url.get_secret_value()
    done = recover(directory, config.store, url, damaged=damaged)
    value = {**tables.plain(done.manifest), "adapters": done.adapters, "left_out": done.left_out}
    total = f"{done.manifest.rows.get('versions', 0)} versions of {done.adapters} adapters"
    show(as_json, value, "\n".join([*_lost(done.left_out), f"recovered {total}"]))


def _lost(digests: Sequence[str]) -> list[str]:
    return [
        f"{digest}: its files are missing or damaged; register them again" for digest in digests
    ]


def _typed(work: Callable[..., None]) -> Callable[..., None]:
    """Runs a command; a refusal ends it with its exit code, and the cause for the operator."""

    def run(config: Config, **arguments: Any) -> None:
        try:
            work(config, **arguments)
        except Refusal as refusal:
            fail(refusal)

    run.__doc__ = work.__doc__
    return run
