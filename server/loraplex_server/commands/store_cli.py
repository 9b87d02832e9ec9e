"""`loraplex-server store`: commands on the adapter store, which servers may use meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from loraplex_adapters.format.digest import is_digest
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Record, Store, VersionText, require_store
from loraplex_adapters.store.index.ids import check_name
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import BASE_MODEL_REASONS, Reason, Refusal
from rich.console import Console, RenderableType

from loraplex_server.commands import store_import
from loraplex_server.commands import store_tables as tables
from loraplex_server.commands.checks import adapter_limits
from loraplex_server.commands.flags import own_parameters, parameter, with_settings
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit
from loraplex_server.registry.signatures import Signatures
from loraplex_server.registry.terms import RegistrationTerms
from loraplex_server.runtime.failures import for_operator

_DAY = 24 * 3600.0
_PIPE_COLUMNS = 200
_STORE_REASONS = (Reason.STORE_FULL, Reason.STORE_UNAVAILABLE)

app = typer.Typer(
    help="List, add, check and clean up the adapters of a store. Servers may use it meanwhile.",
    no_args_is_help=True,
)


@dataclass(frozen=True, slots=True)
class Shell:
    """The opened store and the settings of one command."""

    store: Store
    config: Config
    as_json: bool

    def show(self, value: Any, *readable: RenderableType) -> None:
        """Prints `value` as JSON if `--json` was given, otherwise `readable`."""
        show(self.as_json, value, *readable)


def show(as_json: bool, value: Any, *readable: RenderableType) -> None:
    """Prints `value` as JSON for programs, otherwise `readable` for people."""
    if as_json:
        typer.echo(json.dumps(value, default=tables.plain, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    console.print(*readable, sep="\n")


Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="Label of the adapter; may be repeated."),
]


_JSON: Final = parameter(
    "as_json", Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")], False
)


def _command(
    name: str, *settings: str, creates: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command on the store: `work` gets a `Shell` and its own arguments.

    `settings` names the settings that it takes besides those of the store. Unless it `creates` a
    store, one must exist.
    """

    def add(work: Callable[..., None]) -> Callable[..., None]:
        def run(config: Config, as_json: bool, **arguments: Any) -> None:
            try:
                if not creates:
                    require_store(config.store)
                with Store(config.store, config.store_url.get_secret_value()) as store:
                    work(Shell(store, config, as_json), **arguments)
            except Refusal as refusal:
                fail(refusal)

        run.__doc__ = work.__doc__
        own = [*own_parameters(work), _JSON]
        app.command(name)(with_settings(run, ("store", "store_url", *settings), own))
        return work

    return add


@_command("ls")
def ls(
    shell: Shell,
    *,
    label: Labels = None,
    versions: Annotated[
        bool, typer.Option("--versions", help="List all versions, not only the current ones.")
    ] = False,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="List deleted adapters that can be restored.")
    ] = False,
) -> None:
    """List the adapters."""
    if deleted:
        records = list(shell.store.deleted())
    else:
        records = list(shell.store.current(_labels(label)))
        if versions:
            records = [v for record in records for v in shell.store.versions(record.name)]
    shell.show(
        records,
        tables.records_table(records, deleted=deleted) if records else "no adapters",
    )


@_command("import", "model", "max_adapter_file", "adapter_signatures", creates=True)
def import_(
    shell: Shell,
    directory: Annotated[
        Path, typer.Argument(help="Directory with adapter_config.json and the weights.")
    ],
    *,
    name: Annotated[str, typer.Option("--name", help="Name to register it under.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Register a new version if the name exists.")
    ] = False,
    label: Labels = None,
    chat_template: store_import.TemplateFile = None,
    eos_token_id: store_import.EndTokens = None,
    signature: store_import.SignatureFile = None,
    convert: store_import.Convert = False,
    rank: store_import.Rank = None,
    alpha: store_import.Alpha = None,
    dry_run: store_import.DryRun = False,
) -> None:
    """Check an adapter against the base model and register it."""
    check_name(name)
    conversion = store_import.Conversion(convert, rank, alpha)
    conversion.check()
    labels = _labels(label)
    text = VersionText.of(store_import.read_template(chat_template), eos_token_id or ())
    signed = store_import.read_signature(signature)
    terms = RegistrationTerms(name, text=text, signature=signed)
    approve = Signatures(shell.config.adapter_signatures).approval(terms)
    base, limits = _base(shell.config)
    done = store_import.import_adapter(
        shell.store,
        name,
        directory,
        base,
        limits,
        replace=replace,
        labels=labels,
        text=text,
        conversion=conversion,
        dry_run=dry_run,
        approve=approve,
    )
    shell.show(done.value, *done.lines)


@_command("rebase", "model", "max_adapter_file")
def rebase(
    shell: Shell,
    adapter_ids: Annotated[
        list[str] | None,
        typer.Argument(help="Adapters to check; without them the earlier changes are listed."),
    ] = None,
    *,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Check every version that was registered for another base."),
    ] = False,
) -> None:
    """Check adapters against the base model and record that they are for it.

    An adapter that does not fit stays as it was. Whether it answers sensibly on another base of the
    same shape is for the operator to judge. Exit 1 if one does not fit.
    """
    if not adapter_ids and not everything:
        found = shell.store.rebases()
        shell.show(found, tables.rebases_table(found) if found else "no changes of bases")
        return
    base, limits = _base(shell.config)
    ids = adapter_ids or _of_other_bases(shell.store, base)
    done: list[Record] = []
    refused: dict[str, Refusal] = {}
    for adapter_id in ids:
        try:
            done.append(shell.store.rebase(adapter_id, base, limits))
        except Refusal as refusal:
            if refusal.reason in _STORE_REASONS:
                raise
            refused[adapter_id] = refusal
    lines = [f"{record.id}: recorded for {tables.base_text(record)}" for record in done]
    lines += [f"{adapter_id}: {refusal}" for adapter_id, refusal in refused.items()]
    lines.append(f"{len(done)} recorded, {len(refused)} refused")
    shell.show({"recorded": done, "refused": refused}, "\n".join(lines))
    if refused:
        raise typer.Exit(ServerExit.REFUSED)


@_command("rm")
def rm(shell: Shell, name: Annotated[str, typer.Argument(help="Name to delete.")]) -> None:
    """Delete an adapter, even a damaged one; `restore` undoes that until `gc` removes it."""
    shell.store.delete(name)
    shell.show({"name": name, "deleted": True}, f"{name} was deleted")


@_command("verify")
def verify(
    shell: Shell,
    adapter_ids: Annotated[
        list[str] | None, typer.Argument(help="Adapters to check; all if none is given.")
    ] = None,
) -> None:
    """Read adapters again and compare them with their digests; exit 1 if one is damaged."""
    if adapter_ids:
        checked = [shell.store.verify_version(adapter_id) for adapter_id in adapter_ids]
    else:
        checked = list(shell.store.verify_all())
    damaged = [verified for verified in checked if verified.error is not None]
    lines = [f"{' '.join(v.versions)}: {v.error}" for v in damaged]
    held = shell.store.quarantined()
    if adapter_ids:
        held = {v.digest: held[v.digest] for v in checked if v.digest in held}
    named = {v.digest: " ".join(v.versions) for v in checked}
    lines += [f"{named.get(d, d)}: quarantined: {q.reason}" for d, q in held.items()]
    more: dict[str, Any] = {"quarantined": list(held.values())} if held else {}
    bases = tables.by_base(shell.store.survey())
    if len(bases) > 1:
        lines += [f"{len(ids)} for the base {base}: {' '.join(ids)}" for base, ids in bases.items()]
        more["bases"] = bases
    shell.show(
        {"checked": len(checked), "damaged": damaged, **more},
        "\n".join([*lines, f"{len(checked)} checked, {len(damaged)} damaged"]),
    )
    if damaged:
        raise typer.Exit(ServerExit.REFUSED)


@_command("gc")
def gc(
    shell: Shell,
    *,
    grace_days: Annotated[
        float,
        typer.Option(
            "--grace-days",
            min=0,
            help="Keep adapters deleted within so many days. Use 0 only if no server is running a "
            "deleted adapter.",
        ),
    ] = 7.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be removed.")
    ] = False,
) -> None:
    """Remove deleted adapters and unused files for good."""
    done = shell.store.gc(grace_days * _DAY, dry_run=dry_run)
    gone = [*done.versions, *(f"alias {alias}" for alias in done.aliases)]
    gone += [f"upload {upload}" for upload in done.uploads]
    verb = "would be freed" if dry_run else "freed"
    total = f"{len(done.digests)} adapters, {tables.size_text(done.bytes)} {verb}"
    shell.show(
        {"dry_run": dry_run, **tables.plain(done)},
        "\n".join([*gone, f"{total}; {len(done.uploads)} expired uploads"]),
    )


@_command("restore")
def restore(
    shell: Shell, name: Annotated[str, typer.Argument(help="Name of the deleted adapter.")]
) -> None:
    """Undo the last deletion of an adapter."""
    record = shell.store.restore(name)
    shell.show(record, f"{record.id} {record.digest}")


@_command("release")
def release(
    shell: Shell,
    adapter: Annotated[
        str, typer.Argument(help='Adapter, "name" or "name@3", or its digest, "sha256:...".')
    ],
) -> None:
    """End the quarantine of an adapter, so that servers load it again."""
    digest = adapter if is_digest(adapter) else shell.store.resolve(adapter).digest
    if not shell.store.release(digest):
        raise Refusal(Reason.ADAPTER_NOT_FOUND, f"{adapter} is not quarantined")
    shell.show({"digest": digest, "released": True}, f"{adapter} was released")


@_command("alias")
def alias(
    shell: Shell,
    alias: Annotated[
        str | None, typer.Argument(help="Alias; without it, all aliases are listed.")
    ] = None,
    adapter_id: Annotated[
        str | None, typer.Argument(help='Adapter to point to: "name" or "name@3".')
    ] = None,
    *,
    expected: Annotated[
        str | None,
        typer.Option("--expected", help='Adapter that it must point to now; "" if it must be new.'),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the alias.")] = False,
) -> None:
    """List aliases, point one to an adapter, or delete one."""
    if alias is None:
        found = shell.store.aliases()
        shell.show(found, tables.aliases_table(found) if found else "no aliases")
    elif delete:
        shell.store.delete_alias(alias)
        shell.show({"alias": alias, "deleted": True}, f"{alias} was deleted")
    elif adapter_id is None:
        raise typer.BadParameter("give the adapter to point to, or --delete")
    else:
        set_to = shell.store.set_alias(alias, adapter_id, expected)
        shell.show(set_to, f"{alias} -> {set_to.name}@{set_to.version}")


def load_base_info(config: Config) -> BaseInfo:
    """Loads the configured model, from the cache if it is there, and describes it.

    Imports torch. Raises `Refusal`.
    """
    from loraplex_model.checkpoints.load import load_base
    from loraplex_model.ops.dtypes import BY_NAME

    return load_base(config.model, BY_NAME[config.dtype], Path(config.cache)).weights.info


def _base(config: Config) -> tuple[BaseInfo, AdapterLimits]:
    """The configured base model, and the limits of the adapters on it."""
    return load_base_info(config).named(config.model), adapter_limits(config)


def _of_other_bases(store: Store, base: BaseInfo) -> list[str]:
    """Ids of the versions that are not recorded for `base`, also those of an unknown base."""
    every = (version for record in store.current() for version in store.versions(record.name))
    return [v.id for v in every if v.base_fingerprint != base.fingerprint]


def _labels(texts: list[str] | None) -> dict[str, str]:
    labels = {}
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not separator:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


def fail(refusal: Refusal) -> NoReturn:
    """Prints everything that is wrong, and ends the command with the reason's exit code."""
    if len(refusal.problems) == 1:
        typer.echo(f"error: {refusal.reason}: {for_operator(refusal)}", err=True)
    else:
        for problem in refusal.problems:
            typer.echo(f"error: {problem.reason}: {problem.message}", err=True)
    if refusal.reason in BASE_MODEL_REASONS:
        raise typer.Exit(ServerExit.NO_MODEL) from None
    broken = refusal.reason in _STORE_REASONS
    raise typer.Exit(ServerExit.STORE_UNUSABLE if broken else ServerExit.REFUSED) from None
