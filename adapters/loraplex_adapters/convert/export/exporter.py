"""From what an operator asks for to the files, and what there is to say about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.convert.export.account import Kept, total
from loraplex_adapters.convert.export.base import LIMITS, ExportBase, open_adapter, open_base
from loraplex_adapters.convert.export.blend import Method, Recipe, blend, check
from loraplex_adapters.convert.export.factors import FactorsBySite, delta_of, factors_of
from loraplex_adapters.convert.export.gguf_adapter import write_gguf
from loraplex_adapters.convert.export.merged import DTYPES, write_dense, write_nf4
from loraplex_adapters.convert.export.peft_files import write_peft
from loraplex_adapters.format.config import FINGERPRINT_KEY
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.modules import module_path
from loraplex_adapters.format.spec import AdapterLimits, AdapterSpec

WORTH_A_WARNING = 0.01
"""Rounding that adds more than this share of the change is spoken of."""

_MAX_STAMP = 512
_DEFAULT_DTYPES = {"hf": "bf16", "nf4": "bf16", "gguf": "fp32", "peft": "fp32"}


@dataclass(frozen=True, slots=True)
class Request:
    """An export.

    Attributes:
        adapters: as the operator named them; `weights` is empty (1 each), or as long.
        format: "hf", "nf4", "gguf" or "peft".
        dtype: "fp16", "bf16", "fp32", or "" for the format's own.
        blend: "cat", "svd", "ties", "dare", or "" for one adapter as it is.
        rank, density, seed: of `blend.Recipe`.
        cache: of base models.
        force: writes an NF4 merge that loses the change.
    """

    adapters: tuple[str, ...]
    format: str
    model: str
    cache: Path
    weights: tuple[float, ...] = ()
    dtype: str = ""
    blend: str = ""
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    force: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to print: lines for people, warnings, figures for programs."""

    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    figures: dict[str, float | int]


def run(request: Request, target: Path, locate: Callable[[str], Path]) -> Outcome:
    """Makes the directory `target`. `locate` finds an adapter's directory by what names it.

    Raises `Refusal`, and Refusal: FIELD_INVALID (what was asked for), EXPORT_UNSUPPORTED,
    EXPORT_DELTA_LOST, and what reading an adapter raises.
    """
    recipe = _recipe(request)
    directories = [locate(adapter) for adapter in request.adapters]
    base = open_base(request.model, request.cache)
    opened = [open_adapter(directory, base) for directory in directories]
    specs = [spec for spec, _ in opened]
    deltas = [delta for _, delta in opened]
    stamps = _stamps(base, specs, request)
    dtype = DTYPES[request.dtype or _DEFAULT_DTYPES[request.format]]
    lines, figures = [], {}
    factors: FactorsBySite | None = None
    if recipe is not None:
        weights = request.weights or (1.0,) * len(deltas)
        parts = [factors_of(delta, "a blend") for delta in deltas]
        blended = blend(list(zip(parts, weights, strict=True)), recipe)
        factors = blended.factors
        for site, error in blended.errors.items():
            lines.append(f"{module_path(*site):<44} rank {factors[site].rank:>4}  {error:9.2%} cut")
        figures["largest_cut"] = max(blended.errors.values())
    if request.format in ("hf", "nf4"):
        delta = deltas[0] if factors is None else delta_of(factors)
        kept, warnings = _merge(request, target, base, delta, dtype, stamps)
        lines += [
            f"{part.name:<52} retained {part.retained:8.2%}  noise {part.noise:8.2%}"
            for part in kept
        ]
        whole = total([part for part in kept if part.quantised] or kept)
        figures |= {"retained": round(whole.retained, 6), "noise": round(whole.noise, 6)}
        return Outcome(tuple(lines), warnings, figures)
    if factors is None:
        factors = factors_of(deltas[0], f"a {request.format} adapter")
    figures |= {"modules": len(factors), "max_rank": max(f.rank for f in factors.values())}
    if request.format == "gguf":
        name = "+".join(directory.name for directory in directories)
        write_gguf(target, factors, base.weights.config, name=name, dtype=dtype)
        return Outcome(tuple(lines), (), figures)
    origin = {spec.base_model for spec in specs}
    origin_name = origin.pop() if len(origin) == 1 else ""
    write_peft(target, factors, base_model=origin_name, dtype=dtype, stamps=stamps)
    inspect(target, base.weights.info, LIMITS)  # what is written is what would be served
    return Outcome(tuple(lines), _rank_warning(figures["max_rank"]), figures)


def _recipe(request: Request) -> Recipe | None:
    if request.weights and len(request.weights) != len(request.adapters):
        message = f"{len(request.weights)} weights for {len(request.adapters)} adapters"
        raise Refusal(Reason.FIELD_INVALID, message, "weights")
    if request.blend:
        method = Method(request.blend)
        recipe = Recipe(method, request.rank, request.density, request.seed)
        check(recipe)
        return recipe
    if len(request.adapters) != 1:
        raise Refusal(Reason.FIELD_INVALID, "several adapters need --blend", "blend")
    if request.weights or request.rank is not None or request.density is not None:
        message = "weights, rank and density belong to a blend; say which"
        raise Refusal(Reason.FIELD_INVALID, message, "blend")
    return None


def _merge(
    request: Request,
    target: Path,
    base: ExportBase,
    delta: AdapterDelta,
    dtype: torch.dtype,
    stamps: dict[str, str],
) -> tuple[list[Kept], tuple[str, ...]]:
    if request.format == "nf4":
        kept = write_nf4(target, base, delta, dtype, stamps=stamps, force=request.force)
        return kept, ()
    kept = write_dense(target, base, delta, dtype, stamps=stamps)
    noise = total(kept).noise
    if noise <= WORTH_A_WARNING:
        return kept, ()
    word = str(dtype).removeprefix("torch.")
    better = "fp16 or fp32" if dtype == torch.bfloat16 else "fp32"
    return kept, (f"rounding to {word} adds {noise:.1%} of the change as noise; try {better}",)


def _stamps(base: ExportBase, specs: Sequence[AdapterSpec], request: Request) -> dict[str, str]:
    """Where the file comes from, for its metadata."""
    stamps = {
        FINGERPRINT_KEY: base.weights.fingerprint,
        "loraplex_sources": ",".join(spec.digest for spec in specs)[:_MAX_STAMP],
    }
    if request.blend:
        weights = request.weights or (1.0,) * len(specs)
        stamps["loraplex_blend"] = request.blend
        stamps["loraplex_weights"] = ",".join(f"{w:g}" for w in weights)[:_MAX_STAMP]
    return stamps


def _rank_warning(rank: float) -> tuple[str, ...]:
    limit = AdapterLimits().max_rank
    if rank <= limit:
        return ()
    return (f"the largest rank is {rank}; a server takes {limit} unless max_rank says otherwise",)
