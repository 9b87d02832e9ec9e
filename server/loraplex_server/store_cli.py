"""`loraplex-server store`: look after the adapter store, also while servers use it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, get_type_hints

import typer
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Store, Verified
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import BASE_MODEL_REASONS, Reason, Refusal
from rich.console import Console, RenderableType

from loraplex_server import store_tables as tables
from loraplex_server.app import ExitCode
from loraplex_server.config import Config, ConfigError, load

REFUSED: Final = 1
"""Exit code when a command was refused, or found something wrong."""

_DAY = 24 * 3600.0
_PIPE_COLUMNS = 200
_STORE_REASONS = (Reason.STORE_FULL, Reason.STORE_UNAVAILABLE)

app = typer.Typer(
    help="Look after the adapter store, also while servers use it.", no_args_is_help=True
)


@dataclass(frozen=True, slots=True)
class Shell:
    """What a command works with."""

    store: Store
    config: Config
    as_json: bool

    def show(self, value: Any, *readable: RenderableType) -> None:
        """Prints `value` as JSON if that was asked for, else what people read."""
        if self.as_json:
            typer.echo(json.dumps(value, ensure_ascii=False))
            return
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _PIPE_COLUMNS
        console.print(*readable, sep="\n")


_COMMON: Final[dict[str, Any]] = {
    "config": Annotated[
        Path | None, typer.Option("--config", help="The server's TOML file of settings.")
    ],
    "store": Annotated[str | None, typer.Option("--store", help="The store's directory.")],
    "store_url": Annotated[
        str | None,
        typer.Option("--store-url", help="The database of a shared store (LORAPLEX_STORE_URL)."),
    ],
    "as_json": Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")],
}

Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="May be given repeatedly.")
]


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of the store: `work` gets a `Shell` and its own arguments."""

    def add(work: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(work, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in list(inspect.signature(work).parameters.values())[1:]
        ]
        common = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if key == "as_json" else None,
                annotation=annotation,
            )
            for key, annotation in _COMMON.items()
        ]

        def run(**arguments: Any) -> None:
            config, as_json = _config(arguments), arguments.pop("as_json")
            try:
                with Store(config.store, config.store_url.get_secret_value()) as store:
                    work(Shell(store, config, as_json), **arguments)
            except Refusal as refusal:
                _fail(refusal)

        run.__doc__ = work.__doc__
        run.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *common)}
        app.command(name)(run)
        return work

    return add


@_command("ls")
def ls(
    shell: Shell,
    *,
    label: Labels = None,
    versions: Annotated[
        bool, typer.Option("--versions", help="Not the current ones alone.")
    ] = False,
    deleted: Annotated[bool, typer.Option("--deleted", help="What can still be restored.")] = False,
) -> None:
    """List the adapters."""
    if deleted:
        records = list(shell.store.deleted())
    else:
        records, token, wanted = [], "", _labels(label)
        while True:
            page = shell.store.list(1000, token, wanted)
            records += page.records
            token = page.next_page_token
            if not token:
                break
        if versions:
            records = [v for record in records for v in shell.store.versions(record.name)]
    shell.show(
        [tables.record_json(record) for record in records],
        tables.records_table(records, deleted=deleted) if records else "no adapters",
    )


@_command("import")
def import_(
    shell: Shell,
    directory: Annotated[Path, typer.Argument(help="With adapter_config.json and its weights.")],
    *,
    name: Annotated[str, typer.Option("--name", help="What requests will call it.")],
    replace: Annotated[bool, typer.Option("--replace", help="The name may hold others.")] = False,
    label: Labels = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The base to check it against.")
    ] = None,
) -> None:
    """Check an adapter against the base model and register it."""
    config = shell.config
    limits = AdapterLimits(
        max_rank=config.max_rank,
        max_device_bytes=int(config.adapter_memory),
        max_virtual_tokens=config.adapter_virtual_tokens,
    )
    if model is not None:
        config = config.model_copy(update={"model": model})
    record, created = shell.store.register(
        name, directory, load_base_info(config), limits, replace, _labels(label)
    )
    shell.show(
        {**tables.record_json(record), "created": created},
        f"{record.id} {record.digest}" + ("" if created else " (it was there already)"),
    )


@_command("verify")
def verify(
    shell: Shell,
    adapter_ids: Annotated[list[str] | None, typer.Argument(help="All, if none is named.")] = None,
) -> None:
    """Read adapters again and compare them with their digests; exit 1 if one is damaged."""
    if adapter_ids:
        checked = [_verified(shell.store, adapter_id) for adapter_id in adapter_ids]
    else:
        checked = list(shell.store.verify_all())
    damaged = [verified for verified in checked if verified.error is not None]
    lines = [f"{' '.join(v.versions)}: {v.error}" for v in damaged]
    shell.show(
        {"checked": len(checked), "damaged": [tables.verified_json(v) for v in damaged]},
        "\n".join([*lines, f"{len(checked)} checked, {len(damaged)} damaged"]),
    )
    if damaged:
        raise typer.Exit(REFUSED)


@_command("gc")
def gc(
    shell: Shell,
    *,
    grace_days: Annotated[
        float,
        typer.Option(
            "--grace-days",
            min=0,
            help="Keep what was deleted since. 0 only when no server runs with a deleted adapter.",
        ),
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove deleted adapters and unused bytes for good."""
    done = shell.store.gc(grace_days * _DAY, dry_run=dry_run)
    gone = [*done.versions, *(f"alias {alias}" for alias in done.aliases)]
    verb = "would be freed" if dry_run else "freed"
    total = f"{len(done.digests)} adapters' bytes, {tables.size_text(done.bytes)} {verb}"
    shell.show(
        tables.collected_json(done, dry_run),
        "\n".join([*gone, f"{total}; {len(done.uploads)} expired uploads"]),
    )


@_command("restore")
def restore(
    shell: Shell, name: Annotated[str, typer.Argument(help="The deleted adapter's name.")]
) -> None:
    """Take back the last deletion of an adapter."""
    record = shell.store.restore(name)
    shell.show(tables.record_json(record), f"{record.id} {record.digest}")


@_command("alias")
def alias(
    shell: Shell,
    alias: Annotated[str | None, typer.Argument(help="Without it, list all.")] = None,
    adapter_id: Annotated[
        str | None, typer.Argument(help='What it is to point to: "name", "name@3".')
    ] = None,
    *,
    expected: Annotated[
        str | None,
        typer.Option("--expected", help='Only if it points there now; "" if it must be new.'),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Forget the alias.")] = False,
) -> None:
    """List aliases, point one to an adapter, or delete one."""
    if alias is None:
        found = shell.store.aliases()
        shell.show(
            [tables.alias_json(each) for each in found],
            tables.aliases_table(found) if found else "no aliases",
        )
    elif delete:
        shell.store.delete_alias(alias)
        shell.show({"alias": alias, "deleted": True}, f"{alias} is no more")
    elif adapter_id is None:
        raise typer.BadParameter("say what it is to point to, or --delete")
    else:
        set_to = shell.store.set_alias(alias, adapter_id, expected)
        shell.show(tables.alias_json(set_to), f"{alias} -> {set_to.name}@{set_to.version}")


def load_base_info(config: Config) -> BaseInfo:
    """Describes the configured model, which is mapped from the cache, or converted first.

    Imports torch. Raises `ModelError`.
    """
    import torch
    from loraplex_model.checkpoints.load import load_base

    dtype = getattr(torch, config.dtype)
    return load_base(config.model, dtype, Path(config.cache)).weights.info


def _config(arguments: dict[str, Any]) -> Config:
    file = arguments.pop("config")
    flags = {key: arguments.pop(key) for key in ("store", "store_url")}
    try:
        return load(file, {key: value for key, value in flags.items() if value is not None})
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ExitCode.BAD_CONFIG) from None


def _labels(texts: list[str] | None) -> dict[str, str]:
    labels = {}
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not separator:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


def _verified(store: Store, adapter_id: str) -> Verified:
    record = store.resolve(adapter_id)
    try:
        store.verify(record.digest)
    except Refusal as error:
        return Verified(record.digest, (record.id,), error)
    return Verified(record.digest, (record.id,), None)


def _fail(refusal: Refusal) -> NoReturn:
    for problem in refusal.problems:
        typer.echo(f"error: {problem.reason}: {problem.message}", err=True)
    if refusal.reason in BASE_MODEL_REASONS:
        raise typer.Exit(ExitCode.NO_MODEL) from None
    broken = refusal.reason in _STORE_REASONS
    raise typer.Exit(ExitCode.STORE_UNUSABLE if broken else REFUSED) from None
