"""`loraplex-server store backup` and `store recover`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
from loraplex_server.training.backup.folders import TrainingFolders
from loraplex_server.training.records import DATA

_STORE: Final = ("store", "store_url", "training_jobs_dir")
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Training = Annotated[
    bool,
    typer.Option(
        "--training/--no-training",
        help="Whether data files and records of training jobs are part of it.",
    ),
]


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
    training: _Training = True,
) -> None:
    """Back up the store to DIR, or bring the backup in DIR up to date. Servers may use the store.

    Uploaded data files, and records and events of training jobs, are backed up with it. Only what
    DIR lacks is copied. Exit 1 if files of an adapter, or a data file, are damaged.
    """
    if verify:
        _verify(directory, as_json)
        return
    folders = TrainingFolders(config.training_jobs_dir) if training else None
    url = config.store_url.get_secret_value()
    done = back_up(config.store, url, directory, prune=prune, attachments=folders)
    value = {
        **tables.plain(done.manifest),
        "copied": done.copied,
        "pruned": done.pruned,
        "attached_copied": done.attached_copied,
    }
    size = tables.size_text(sum(done.manifest.blobs.values()))
    total = (
        f"{done.manifest.rows.get('versions', 0)} versions of {len(done.manifest.blobs)} adapters"
    )
    copied = f"{len(done.copied)} copied, {len(done.pruned)} pruned"
    lines = [*_lost(done.manifest.lost), *_lost_records(done.manifest.attached_lost)]
    lines.append(f"{total}, {size}; {copied}")
    if done.manifest.attached:
        lines.append(f"{_records(done.manifest.attached)}; {done.attached_copied} contents copied")
    show(as_json, value, "\n".join(lines))
    if done.manifest.lost or done.manifest.attached_lost:
        raise typer.Exit(ServerExit.REFUSED)


def _verify(directory: Path, as_json: bool) -> None:
    """Reads a backup, and prints what is wrong with it."""
    checked = check_backup(directory)
    manifest, damaged, records = checked.manifest, checked.damaged, checked.attached_damaged
    value = {**tables.plain(manifest), "damaged": damaged, "attached_damaged": records}
    lines = [*damaged.values(), *_lost(manifest.lost)]
    lines += [*records.values(), *_lost_records(manifest.attached_lost)]
    good = len(manifest.blobs) - len(damaged)
    lines.append(f"{good} adapters are intact, {len(damaged)} damaged")
    if manifest.attached:
        intact = manifest.attached.keys() - records.keys()
        lines.append(f"{_records(intact)} are intact, {len(records)} damaged")
    show(as_json, value, "\n".join(lines))
    if damaged or records:
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
        typer.Option(
            "--damaged", help="Leave out adapters and records whose files in DIR are damaged."
        ),
    ] = False,
    training: _Training = True,
) -> None:
    """Make a new store of the backup in DIR. The store's directory and database must be empty.

    So must training_jobs_dir, if the backup has data files or records of training jobs.
    Everything is checked before anything is written. An interrupted recovery is continued by the
    same command; no server can open the store before it has ended.
    """
    url = config.store_url.get_secret_value()
    jobs = config.training_jobs_dir if training else None
    done = recover(directory, config.store, url, damaged=damaged, attached=jobs)
    absent = done.folders_left_out
    value = {
        **tables.plain(done.manifest),
        "adapters": done.adapters,
        "left_out": done.left_out,
        "folders": done.folders,
        "folders_left_out": absent,
    }
    total = f"{done.manifest.rows.get('versions', 0)} versions of {done.adapters} adapters"
    lines = [*_lost(done.left_out), *(_lost_records(absent) if training else [])]
    lines.append(f"recovered {total}")
    if done.folders:
        lines.append(f"recovered {_records(done.manifest.attached.keys() - set(absent))}")
    elif absent and not training:
        lines.append(f"left out: {_records(absent)}")
    show(as_json, value, "\n".join(lines))


def _lost(digests: Sequence[str]) -> list[str]:
    return [
        f"{digest}: its files are missing or damaged; register them again" for digest in digests
    ]


def _lost_records(names: Sequence[str]) -> list[str]:
    return [f"{name}: the record or the data is missing or damaged" for name in names]


def _records(names: Collection[str]) -> str:
    """How many folders of each kind there are."""
    files = sum(name.startswith(f"{DATA}/") for name in names)
    return f"{files} data files and {len(names) - files} records of training jobs"


def _typed(work: Callable[..., None]) -> Callable[..., None]:
    """Runs a command; a refusal ends it with its exit code, and the cause for the operator."""

    def run(config: Config, **arguments: Any) -> None:
        try:
            work(config, **arguments)
        except Refusal as refusal:
            fail(refusal)

    run.__doc__ = work.__doc__
    return run
