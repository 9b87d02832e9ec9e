"""Commands on the files of adapters: `export`, `convert`, `import-adapterhub`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from loraplex_adapters.convert.export.directory import staged
from loraplex_adapters.convert.importers import adapterhub
from loraplex_adapters.store import Record, Store, require_store
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.commands.flags import with_settings
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit
from loraplex_server.registry.servable import other_base

if TYPE_CHECKING:  # imports torch, which is slow
    from loraplex_adapters.convert.export.exporter import ExportRequest, ExportResult

_CONVERTED = "converted to {}; registration will check it against the base model"


def export(
    config: Config,
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter directories, or ids in the store (name, name@3).")
    ],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    format_: Annotated[
        Literal["hf", "nf4", "gguf", "peft"], typer.Option("--format", help="Format to write.")
    ],
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None,
        typer.Option(
            help="Type of the written tensors; by default bf16 for hf and nf4, fp32 otherwise."
        ),
    ] = None,
    blend: Annotated[
        Literal["cat", "svd", "ties", "dare"] | None,
        typer.Option(help="Method to combine several adapters; LoRA only."),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weights of the adapters, such as 0.7,0.3; by default 1 each.")
    ] = "",
    rank: Annotated[int | None, typer.Option(help="Rank of the blend; not for cat.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the elements that ties and dare keep.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of dare.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export; allow a lossy NF4 merge.")
    ] = False,
) -> None:
    """Write an adapter, or a blend of several, for other programs.

    Formats: hf is the base with the adapter merged in, nf4 the same quantised, gguf an adapter for
    llama.cpp, peft a plain LoRA adapter.
    """
    from loraplex_adapters.convert.export.exporter import ExportRequest, run

    request = ExportRequest(
        adapters=tuple(adapters),
        weights=_numbers(weights),
        format=format_,
        model=config.model,
        dtype=dtype or "",
        blend=blend or "",
        rank=rank,
        density=density,
        seed=seed,
        cache=config.cache,
        force=force,
    )
    with _errors(), staged(out, force=force) as target:
        url = config.store_url.get_secret_value()
        sources = _Adapters(config.store, url)
        outcome = run(request, target, sources.locate, sources.accept)
    _report(outcome, request, out)


def convert(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    origin: Annotated[
        Literal["pissa", "adapterhub"], typer.Option("--from", help="Kind of the adapter.")
    ],
    initial: Annotated[
        Path | None, typer.Option(help="For pissa: the adapter as it was saved before training.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Convert an adapter of another kind into one that can be served, if that is exact.

    Kinds: pissa stands for PiSSA, OLoRA, CorDA and LoRA-GA, which become plain LoRA; adapterhub for
    bottleneck adapters.
    """
    with _errors(), staged(out, force=force) as target:
        if origin == "adapterhub":
            adapterhub.convert(adapter, target)
        elif initial is None:
            message = "--from pissa needs --initial: the adapter as it was before training"
            raise Refusal(Reason.FIELD_INVALID, message, "initial")
        else:
            from loraplex_adapters.convert.export import mutated

            mutated.convert(adapter, initial, target)
    typer.echo(_CONVERTED.format(out))


def import_adapterhub(source: Path, target: Path) -> None:
    """Convert the AdapterHub adapter SOURCE into the new directory TARGET, if that is exact."""
    try:
        adapterhub.convert(source, target)
    except Refusal as refusal:
        for problem in refusal.problems:
            typer.echo(f"error: {problem.reason}: {problem.message}", err=True)
        raise typer.Exit(ServerExit.REFUSED) from None
    typer.echo(_CONVERTED.format(target))


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command("import-adapterhub")(import_adapterhub)
    app.command("export")(with_settings(export, ("model", "store", "store_url", "cache")))
    app.command("convert")(convert)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except Refusal as error:
        typer.echo(f"error: {error.reason}: {error.message}", err=True)
        raise typer.Exit(ServerExit.BAD_CONFIG) from None


def _numbers(text: str) -> tuple[float, ...]:
    with _errors():
        try:
            return tuple(float(part) for part in text.split(",")) if text else ()
        except ValueError:
            message = "must be numbers separated by commas"
            raise Refusal(Reason.FIELD_INVALID, message, "weights") from None


class _Adapters:
    """Finds adapters by directory or id; those of a store are only for the base recorded there."""

    def __init__(self, root: Path, url: str) -> None:
        self._root = root
        self._url = url
        self._records: list[Record] = []

    def locate(self, adapter: str) -> Path:
        """The directory of an adapter. Raises Refusal as `Store.resolve` does."""
        if Path(adapter).is_dir():
            return Path(adapter)
        if not self._root.is_dir():
            message = f"{adapter} is not a directory, and there is no store at {self._root}"
            raise Refusal(Reason.ADAPTER_NOT_FOUND, message, "adapter")
        require_store(self._root)
        with Store(self._root, self._url) as opened:
            record = opened.resolve(adapter)
            self._records.append(record)
            return opened.path(record.digest)

    def accept(self, base: BaseInfo) -> None:
        """Raises Refusal(BASE_MODEL_MISMATCH) if a located version is for another base."""
        for record in self._records:
            if (problem := other_base(record, base)) is not None:
                raise Refusal.of([problem])


def _report(outcome: ExportResult, request: ExportRequest, out: Path) -> None:
    for line in outcome.lines:
        typer.echo(line)
    for warning in outcome.warnings:
        typer.echo(f"warning: {warning}", err=True)
    result = {"format": request.format, "out": str(out), **outcome.figures}
    typer.echo(json.dumps(result))
