"""The work of `loraplex-server store import`: conversion, check and registration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.files import open_directory
from loraplex_adapters.format.foreign.notes import MAX_NOTED_FILES, folder_notes
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Approval, Store, VersionText
from loraplex_model.base.info import BaseInfo

from loraplex_server.commands import store_tables as tables

Convert = Annotated[
    bool,
    typer.Option(
        "--convert",
        help="Rewrite an adapter that differs from PEFT's only in names and layout: foreign "
        "prefixes, MLX, mistral-finetune, Tinker, several weights files.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only print what would be converted, and check the adapter."),
]
Rank = Annotated[
    int | None, typer.Option(min=1, help="With --convert: rank that the tensors must have.")
]
Alpha = Annotated[
    float | None,
    typer.Option(help="With --convert: alpha of an adapter whose files do not state it."),
]
TemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        help="Jinja file: the chat template of this version, in place of the base model's. "
        "Servers use it with --adapter-chat-templates.",
    ),
]
EndTokens = Annotated[
    list[int] | None,
    typer.Option(
        "--eos-token-id",
        metavar="ID",
        help="Token that ends answers of this version, in place of the base model's end "
        "tokens; may be repeated.",
    ),
]

SignatureFile = Annotated[
    Path | None,
    typer.Option(
        "--signature",
        metavar="FILE",
        help="Signature of the adapter, if --adapter-signatures needs one.",
    ),
]


@dataclass(frozen=True, slots=True)
class Conversion:
    """Whether to convert an adapter, and what its files do not state."""

    wanted: bool = False
    rank: int | None = None
    alpha: float | None = None

    def check(self) -> None:
        """Raises BadParameter if rank or alpha are given without a conversion."""
        if not self.wanted and (self.rank is not None or self.alpha is not None):
            raise typer.BadParameter("--rank and --alpha need --convert")


@dataclass(frozen=True, slots=True)
class Imported:
    """The result of an import: for programs, and lines for people."""

    value: Mapping[str, Any]
    lines: Sequence[str]


def import_adapter(
    store: Store,
    name: str,
    directory: Path,
    base: BaseInfo,
    limits: AdapterLimits,
    *,
    replace: bool,
    labels: Mapping[str, str],
    text: VersionText,
    conversion: Conversion,
    dry_run: bool,
    approve: Approval | None = None,
) -> Imported:
    """Registers an adapter, or with `dry_run` only checks it. Raises Refusal as the store does."""
    with _converted(directory, base, limits, conversion) as (source, changes):
        also = {"converted": changes} if conversion.wanted else {}
        if dry_run:
            digest = inspect(source, base, limits).digest
            if approve is not None:
                approve(source)
            value = {"dry_run": True, "name": name, "digest": digest, **also}
            return Imported(value, (*changes, f"{name} {digest} would be registered"))
        record, created = store.register(
            *(name, source, base, limits, replace, labels), text=text, approve=approve
        )
    with open_directory(directory) as opened:
        notes = folder_notes(opened.names(MAX_NOTED_FILES), bool(text.chat_template))
    notes += record.notes
    done = f"{record.id} {record.digest}" + ("" if created else " (registered already)")
    value = {**tables.plain(record), "created": created, "notes": notes, **also}
    return Imported(value, (*changes, done, *(f"note: {note}" for note in notes)))


def read_signature(path: Path | None) -> bytes:
    """The bytes of a signature's file; b"" for None. Raises BadParameter."""
    try:
        return path.read_bytes() if path is not None else b""
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}"
        raise typer.BadParameter(text, param_hint="--signature") from None


def read_template(path: Path | None) -> str:
    """The text of a chat template's file; "" for None. Raises BadParameter."""
    if path is None:
        return ""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        text = f"{path} cannot be read as UTF-8 text: {error}"
        raise typer.BadParameter(text, param_hint="--chat-template") from None


@contextmanager
def _converted(
    directory: Path, base: BaseInfo, limits: AdapterLimits, conversion: Conversion
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The directory to import, and a line for everything that was converted.

    Without a conversion, or if there is nothing to convert, that is `directory` itself. A converted
    copy is removed at the end. Raises Refusal: as converting and as reading an adapter does.
    """
    if not conversion.wanted:
        yield directory, ()
        return
    from loraplex_adapters.convert.importers.rewrite import convert

    with tempfile.TemporaryDirectory(prefix="loraplex-convert-") as place:
        plan = convert(
            directory,
            Path(place, "adapter"),
            base,
            rank=conversion.rank,
            alpha=conversion.alpha,
            max_bytes=limits.max_weights_bytes,
        )
        if plan.lines:
            yield Path(place, "adapter"), plan.lines
        else:
            yield directory, ("nothing to convert",)
