"""`loraplex-server support-matrix`: what is served, from the tables by which files are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import typer
from loraplex_adapters.format import matrix
from loraplex_adapters.format.kinds import KINDS
from loraplex_adapters.format.support import UNSERVED
from loraplex_model.base.families import FAMILIES, TEXT_PARTS, Family

_OWN_KINDS = frozenset({"BOTTLENECK"})
"""Kinds that are not among PEFT's types."""

_HEAD = (
    "architecture",
    "`model_type`",
    "safetensors",
    "bitsandbytes NF4",
    "GGUF",
    "training",
    "CUDA",
    "features",
    "features that a configuration decides",
)


def print_matrix() -> None:
    """Print the supported base models, kinds of adapters and options as Markdown.

    The last line is JSON: the number of families, and of PEFT's kinds that are served.
    """
    typer.echo(f"{families_markdown()}\n\n{matrix.markdown()}\n")
    typer.echo(json.dumps(summary()))


def summary() -> Mapping[str, int]:
    """The number of families, of PEFT's kinds that are served, and of all of PEFT's kinds."""
    served = KINDS.keys() - _OWN_KINDS
    return {"families": len(FAMILIES), "kinds_served": len(served), "of": len({*served, *UNSERVED})}


def families_markdown() -> str:
    """The families as in docs/models.md, without a trailing newline."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _row(_HEAD)
    yield "|" + "---|" * len(_HEAD)
    for architecture, family in FAMILIES.items():
        yield _row([f"`{architecture}`", *_cells(family)])
    for architecture, families in TEXT_PARTS.items():
        named = " or ".join(f"`{name}`" for name in families)
        text = [f"`{architecture}`", "", "served", "served", "see there", "see there", "see there"]
        yield _row([*text, f"the text decoder, a {named}; no images", ""])


def _cells(family: Family) -> Iterator[str]:
    # torch and transformers are not needed before
    from loraplex_model.checkpoints.outlook.features import of_family

    has_experts = "num_experts" in family.settings
    yield f"`{family.model_type}`"
    yield "served"
    yield "served"
    yield f"`{family.gguf}`" if family.gguf else "not read"
    yield "all but the experts" if has_experts else "served"
    yield "torch, not the kernels" if has_experts else "kernels"
    for features in of_family(family):
        yield ", ".join(features)


def _row(cells: Iterable[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
