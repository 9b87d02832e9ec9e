"""`loraplex-server export` and `convert`: adapters for other programs, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from loraplex_adapters.convert.export.directory import staged
from loraplex_adapters.convert.importers import adapterhub
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.config import Config, ConfigError, load

if TYPE_CHECKING:  # these import torch, which other commands need not wait for
    from loraplex_adapters.convert.export.exporter import Outcome, Request

BAD_INPUT = 2
"""Exit code for everything that an operator can mend."""


class Format(StrEnum):
    """What can be written."""

    HF = "hf"
    NF4 = "nf4"
    GGUF = "gguf"
    PEFT = "peft"


class Dtype(StrEnum):
    """Types of the written tensors."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"


class Blend(StrEnum):
    """How several adapters become one."""

    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    DARE = "dare"


class Origin(StrEnum):
    """What can be converted."""

    PISSA = "pissa"
    ADAPTERHUB = "adapterhub"


def export(
    adapters: Annotated[
        list[str], typer.Argument(help="Directories, or ids in the store (name, name@3).")
    ],
    out: Annotated[Path, typer.Option(help="The new directory.")],
    format_: Annotated[Format, typer.Option("--format", help="What to write.")],
    model: Annotated[str | None, typer.Option(help="The base, as for serve.")] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Type of the tensors; bf16 for hf and nf4, fp32 for gguf and peft."),
    ] = None,
    blend: Annotated[
        Blend | None, typer.Option(help="How to make one adapter of several; LoRA only.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="The adapters' weights, such as 0.7,0.3; 1 each if not given.")
    ] = "",
    rank: Annotated[int | None, typer.Option(help="Rank of a blend; not for cat.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the elements that ties and dare keep.")
    ] = None,
    seed: Annotated[int, typer.Option(help="What dare drops.")] = 0,
    store: Annotated[str | None, typer.Option(help="Where registered adapters lie.")] = None,
    store_url: Annotated[
        str | None, typer.Option(help="The database of a shared store (LORAPLEX_STORE_URL).")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Where base models lie.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="The server's TOML file of settings.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export; write a lossy NF4 merge.")
    ] = False,
) -> None:
    """Write an adapter, or a blend of several, for other programs.

    hf: the base with the adapter merged in. nf4: the same, quantised. gguf: an adapter for
    llama.cpp. peft: a plain LoRA adapter. Model, store and cache are the server's settings, unless
    they are given.
    """
    from loraplex_adapters.convert.export.exporter import Request, run

    given = {"model": model, "store": store, "store_url": store_url, "cache": cache}
    settings = _settings(config, {name: value for name, value in given.items() if value})
    request = Request(
        adapters=tuple(adapters),
        weights=_numbers(weights),
        format=format_.value,
        model=settings.model,
        dtype=dtype.value if dtype else "",
        blend=blend.value if blend else "",
        rank=rank,
        density=density,
        seed=seed,
        cache=settings.cache,
        force=force,
    )
    with _errors(), staged(out, force=force) as target:
        url = settings.store_url.get_secret_value()
        outcome = run(request, target, _locator(settings.store, url))
    _report(outcome, request, out)


def convert(
    adapter: Annotated[Path, typer.Argument(help="The adapter's directory.")],
    out: Annotated[Path, typer.Option(help="The new directory.")],
    origin: Annotated[Origin, typer.Option("--from", help="What the adapter is.")],
    initial: Annotated[
        Path | None, typer.Option(help="pissa: the adapter as it was saved before training.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Turn an adapter of another kind into one that is served, where that is exact.

    pissa: PiSSA, OLoRA, CorDA, LoRA-GA into plain LoRA. adapterhub: a bottleneck adapter.
    """
    with _errors(), staged(out, force=force) as target:
        if origin is Origin.ADAPTERHUB:
            adapterhub.convert(adapter, target)
        elif initial is None:
            message = "--from pissa needs --initial, the adapter as it was before training"
            raise Refusal(Reason.FIELD_INVALID, message, "initial")
        else:
            from loraplex_adapters.convert.export import mutated

            mutated.convert(adapter, initial, target)
    typer.echo(f"converted to {out}; registering it checks it against a base")


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command("export")(export)
    app.command("convert")(convert)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except Refusal as error:
        typer.echo(f"error: {error.reason}: {error.message}", err=True)
        raise typer.Exit(BAD_INPUT) from None


def _settings(file: Path | None, given: dict[str, Any]) -> Config:
    try:
        return load(file, given)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None


def _numbers(text: str) -> tuple[float, ...]:
    with _errors():
        try:
            return tuple(float(part) for part in text.split(",")) if text else ()
        except ValueError:
            message = "weights are numbers with commas between them"
            raise Refusal(Reason.FIELD_INVALID, message, "weights") from None


def _locator(root: Path, url: str) -> Callable[[str], Path]:
    """A function from an adapter as the operator names it to its directory."""

    def locate(adapter: str) -> Path:
        if Path(adapter).is_dir():
            return Path(adapter)
        if not root.is_dir():
            message = f"{adapter} is no directory, and there is no store at {root}"
            raise Refusal(Reason.ADAPTER_NOT_FOUND, message, "adapter")
        from loraplex_adapters.store import Store

        with Store(root, url) as opened:
            return opened.path(opened.resolve(adapter).digest)

    return locate


def _report(outcome: Outcome, request: Request, out: Path) -> None:
    for line in outcome.lines:
        typer.echo(line)
    for warning in outcome.warnings:
        typer.echo(f"warning: {warning}", err=True)
    result = {"format": request.format, "out": str(out), **outcome.figures}
    typer.echo(json.dumps(result))
