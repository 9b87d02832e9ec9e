"""Exports of adapters: from an operator's request to the files and a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.load import LoadedBase

from loraplex_adapters.convert.export.account import Kept, total
from loraplex_adapters.convert.export.base import LIMITS, open_adapter, open_base
from loraplex_adapters.convert.export.blend import BlendMethod, BlendSpec, blend, check
from loraplex_adapters.convert.export.factors import FactorsBySite, delta_of, factors_of
from loraplex_adapters.convert.export.gguf_adapter import write_gguf
from loraplex_adapters.convert.export.merged import DTYPES, write_dense, write_nf4
from loraplex_adapters.convert.export.peft_files import write_peft
from loraplex_adapters.format.config import FINGERPRINT_KEY
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.modules import ModulePaths
from loraplex_adapters.format.reader import MAX_STAMP
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter

WORTH_A_WARNING = 0.01
"""Noise of rounding, relative to the change, above which a warning is given."""

_DEFAULT_DTYPES = {"hf": "bf16", "nf4": "bf16", "gguf": "fp32", "peft": "fp32"}


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """An export that an operator asks for.

    Attributes:
        adapters: adapters as the operator named them.
        weights: one weight for each adapter; empty for 1 each.
        format: "hf", "nf4", "gguf" or "peft".
        dtype: "fp16", "bf16", "fp32", or "" for the format's default.
        blend: "cat", "svd", "ties", "dare", or "" for one adapter without a blend.
        rank, density, seed: as in `BlendSpec`.
        cache: directory of cached base models.
        force: whether to write an NF4 merge that loses the change.
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
class ExportResult:
    """The report of an export: lines for people, warnings, figures for programs."""

    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    figures: dict[str, float | int]


def run(
    request: ExportRequest,
    target: Path,
    locate: Callable[[str], Path],
    accept: Callable[[BaseInfo], None] = lambda base: None,
) -> ExportResult:
    """Writes the export to the new directory `target`; `locate` maps a name to its directory.

    `accept` may refuse the base once it is known. Raises Refusal: FIELD_INVALID (the request),
    EXPORT_UNSUPPORTED, EXPORT_DELTA_LOST, and as loading the base or reading an adapter does.
    """
    spec = _blend_spec(request)
    directories = [locate(adapter) for adapter in request.adapters]
    base = open_base(request.model, request.cache)
    accept(base.weights.info.named(request.model))
    path = ModulePaths(base.weights.info)
    opened = [open_adapter(directory, base) for directory in directories]
    specs = [spec for spec, _ in opened]
    deltas = [delta for _, delta in opened]
    _refuse_experts(base.weights.config, deltas, request.format)
    stamps = _stamps(base, specs, request)
    dtype = DTYPES[request.dtype or _DEFAULT_DTYPES[request.format]]
    lines, figures = [], {}
    factors: FactorsBySite | None = None
    if spec is not None:
        weights = request.weights or (1.0,) * len(deltas)
        parts = [factors_of(delta, base.weights.config, "a blend") for delta in deltas]
        blended = blend(list(zip(parts, weights, strict=True)), spec)
        factors = blended.factors
        for site, error in blended.errors.items():
            lines.append(f"{path(site):<44} rank {factors[site].rank:>4}  {error:9.2%} cut")
        figures["largest_cut"] = max(blended.errors.values())
    if request.format in ("hf", "nf4"):
        delta = deltas[0] if factors is None else delta_of(factors, base.weights.config)
        kept, warnings = _merge(request, target, base, delta, dtype, stamps)
        lines += [
            f"{part.name:<52} retained {part.retained:8.2%}  noise {part.noise:8.2%}"
            for part in kept
        ]
        whole = total([part for part in kept if part.quantised] or kept)
        figures |= {"retained": round(whole.retained, 6), "noise": round(whole.noise, 6)}
        return ExportResult(tuple(lines), warnings, figures)
    if factors is None:
        factors = factors_of(deltas[0], base.weights.config, f"a {request.format} adapter")
    figures |= {"modules": len(factors), "max_rank": max(f.rank for f in factors.values())}
    if request.format == "gguf":
        name = "+".join(directory.name for directory in directories)
        write_gguf(target, factors, base.weights.config, name=name, dtype=dtype)
        return ExportResult(tuple(lines), (), figures)
    origin = {spec.base_model for spec in specs}
    origin_name = origin.pop() if len(origin) == 1 else ""
    write_peft(target, factors, path, base_model=origin_name, dtype=dtype, stamps=stamps)
    inspect(target, base.weights.info, LIMITS)  # the result must be an adapter that can be served
    return ExportResult(tuple(lines), _rank_warning(figures["max_rank"]), figures)


def _refuse_experts(config: DecoderConfig, deltas: Sequence[AdapterDelta], written: str) -> None:
    """Raises Refusal(EXPORT_UNSUPPORTED) for what cannot be written of a mixture of experts."""
    if not config.num_experts:
        return
    experts, message = config.expert_projections, ""
    if written in ("hf", "nf4"):
        message = "merged checkpoints of mixtures of experts are not written; merge it with PEFT"
    elif any(name in experts for delta in deltas for _, name in delta.sites):
        message = "adapters of experts are not written in other forms; use the adapter's own files"
    if message:
        raise Refusal(Reason.EXPORT_UNSUPPORTED, message, "format")


def _blend_spec(request: ExportRequest) -> BlendSpec | None:
    if request.weights and len(request.weights) != len(request.adapters):
        message = f"{len(request.weights)} weights for {len(request.adapters)} adapters"
        raise Refusal(Reason.FIELD_INVALID, message, "weights")
    if request.blend:
        method = BlendMethod(request.blend)
        spec = BlendSpec(method, request.rank, request.density, request.seed)
        check(spec)
        return spec
    if len(request.adapters) != 1:
        raise Refusal(Reason.FIELD_INVALID, "several adapters need --blend", "blend")
    if request.weights or request.rank is not None or request.density is not None:
        message = "weights, rank and density need --blend"
        raise Refusal(Reason.FIELD_INVALID, message, "blend")
    return None


def _merge(
    request: ExportRequest,
    target: Path,
    base: LoadedBase,
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


def _stamps(
    base: LoadedBase, specs: Sequence[CheckedAdapter], request: ExportRequest
) -> dict[str, str]:
    """Metadata that records the origin of the written weights."""
    stamps = {
        FINGERPRINT_KEY: base.weights.fingerprint,
        "loraplex_sources": ",".join(spec.digest for spec in specs)[:MAX_STAMP],
    }
    if request.blend:
        weights = request.weights or (1.0,) * len(specs)
        stamps["loraplex_blend"] = request.blend
        stamps["loraplex_weights"] = ",".join(f"{w:g}" for w in weights)[:MAX_STAMP]
    return stamps


def _rank_warning(rank: float) -> tuple[str, ...]:
    limit = AdapterLimits().max_rank
    if rank <= limit:
        return ()
    return (f"the largest rank is {rank}; a server accepts {limit} unless max_rank is raised",)
