"""Decides by their values what becomes of the copies in a file, for `examine` and for `load`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason
from loraplex_model.checkpoints.values import BaseValues

from loraplex_adapters.format.copies.comparing import Read, changed_rows, equal, equals_blocks
from loraplex_adapters.format.files import WEIGHTS_FILE
from loraplex_adapters.format.modules import MATRICES, shown_modules
from loraplex_adapters.format.packing import packed_bytes
from loraplex_adapters.format.spec import AdapterLimits, BaseCopy, CheckedAdapter, ModuleSpec
from loraplex_adapters.format.strict_json import shown

_INCOMPARABLE = (
    "cannot be compared with the base, whose stored weights cannot be read; save the adapter "
    "without this tensor"
)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A copy, and whether it differs from the base; `rows` are those that do, () for all."""

    copy: BaseCopy
    differs: bool
    rows: tuple[int, ...] = ()


def check_size(
    modules: Iterable[ModuleSpec], base: BaseInfo, limits: AdapterLimits
) -> list[Problem]:
    """A finding if the modules need more bytes on the device than the limits allow."""
    packed = packed_bytes(modules, base)
    if limits.max_device_bytes is None or packed <= limits.max_device_bytes:
        return []
    message = f"needs {packed} bytes on the device; it has {limits.max_device_bytes}"
    return [Problem(WEIGHTS_FILE, message, Reason.ADAPTER_TOO_LARGE)]


def settle(
    spec: CheckedAdapter, read: Read, base: BaseInfo, limits: AdapterLimits
) -> tuple[CheckedAdapter, list[Problem]]:
    """Compares the values of copies and twins; returns the adapter as it is served, and findings.

    A copy that equals the base is left out. If it differs, the rows that differ are served. If the
    base has no stored file, copies that can be served are served whole, with the same results.
    `read` is called for pieces of at most 4 MiB.
    """
    findings = [
        Problem(
            shown(other.name),
            f"{shown(other.name)} and {shown(one.name)} name one weight and have different values;"
            " keep the one that was trained",
            Reason.ADAPTER_INVALID,
        )
        for one, other in spec.twins
        if not equal(one, other, read)
    ]
    verdicts: list[_Verdict] = []
    with ExitStack() as stack:
        values = _open(base, stack) if spec.copies else None
        for copy in spec.copies:
            verdict = _judge(copy, read, values)
            if verdict is None:
                message = f"{shown(copy.tensor.name)} {_INCOMPARABLE}"
                findings.append(_unsupported(copy, message))
            elif verdict.differs and copy.refusal:
                name = shown(copy.tensor.name)
                message = f"{name} differs from the base's own weight, and {copy.refusal}"
                findings.append(_unsupported(copy, message))
            else:
                verdicts.append(verdict)
    if not spec.copies:
        return replace(spec, twins=()), findings
    settled = _settled(spec, verdicts, base)
    findings += check_size(settled.modules, base, limits)
    if not settled.modules and not findings:
        message = "every tensor is a copy of the base's own weights: the adapter changes nothing"
        findings.append(Problem(WEIGHTS_FILE, message, Reason.ADAPTER_INVALID))
    return settled, findings


def _open(base: BaseInfo, stack: ExitStack) -> BaseValues | None:
    if not base.weights_file:
        return None
    try:
        return stack.enter_context(BaseValues(base.weights_file, base.config))
    except (OSError, ValueError):
        return None


def _judge(copy: BaseCopy, read: Read, values: BaseValues | None) -> _Verdict | None:
    """The verdict on a copy; None if it is needed, and the base's values cannot be read."""
    if not copy.sites and not copy.refusal:
        return _Verdict(copy, differs=False)
    if values is None:
        return None if copy.refusal else _Verdict(copy, differs=True)
    try:
        if copy.site[1] in MATRICES:
            return _Verdict(copy, not equals_blocks(copy.tensor, read, values, copy.site))
        rows = changed_rows(copy.tensor, read, values, copy.site)
        return _Verdict(copy, bool(rows), rows)
    except (OSError, ValueError):
        return None if copy.refusal else _Verdict(copy, differs=True)


def _settled(spec: CheckedAdapter, verdicts: Sequence[_Verdict], base: BaseInfo) -> CheckedAdapter:
    by_site = {site: verdict for verdict in verdicts for site in verdict.copy.sites}
    modules = tuple(
        module
        for found in spec.modules
        if (module := _module(found, by_site.get((found.layer, found.module)))).tensors
    )
    return replace(
        spec,
        modules=modules,
        rank=max((module.rank for module in modules), default=0),
        target_modules=shown_modules(((m.layer, m.module) for m in modules), base),
        packed_bytes=packed_bytes(modules, base),
        copies=(),
        twins=(),
        notes=(*spec.notes, *_notes(verdicts)),
    )


def _module(module: ModuleSpec, verdict: _Verdict | None) -> ModuleSpec:
    if verdict is None:
        return module
    if verdict.differs:
        return replace(module, changed_rows=verdict.rows)
    tensors = {role: t for role, t in module.tensors.items() if role != "weight"}
    return replace(module, tensors=tensors)


def _notes(verdicts: Iterable[_Verdict]) -> list[str]:
    """One sentence for every sort of copies, and one for each that is served."""
    alike: dict[str, list[str]] = {}
    notes = []
    for verdict in verdicts:
        copy, name = verdict.copy, shown(verdict.copy.tensor.name)
        if verdict.differs:
            rows = f"in {len(verdict.rows)} rows " if verdict.rows else ""
            notes.append(f"{name} differs {rows}from the base's own weight and replaces it")
        elif copy.replaced_by:
            other = shown(copy.replaced_by)
            notes.append(f"{name} is not used: the base ties embeddings and head, and {other} "
                         "sets both, as in PEFT")  # fmt: skip
        elif not copy.sites and not copy.refusal:
            alike.setdefault("not used, since the module has a weight of its own", []).append(name)
        else:
            alike.setdefault("left out, since it equals the base's own weight", []).append(name)
    for what, names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(f"{names[0]}{more}: {what}")
    return notes


def _unsupported(copy: BaseCopy, message: str) -> Problem:
    return Problem(shown(copy.tensor.name), message, Reason.ADAPTER_UNSUPPORTED)
