"""Decides whether a base can serve an adapter. Four functions, in the order of what they read:

examine_parsed   nothing: a configuration and a header that were read before
examine_header   both files but not the weights: no digest, values unchecked
examine          both files completely
inspect          both files completely; returns the spec, or raises for the findings
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_adapters.format.config import FINGERPRINT_KEY, Settings, parse_config
from loraplex_adapters.format.copies.placing import place_copies, without_copies
from loraplex_adapters.format.copies.settling import check_size, settle
from loraplex_adapters.format.digest import AdapterDigest
from loraplex_adapters.format.files import WEIGHTS_FILE, Directory, opened
from loraplex_adapters.format.foreign.causes import explained, grouped, led_by
from loraplex_adapters.format.header import Header, read_header
from loraplex_adapters.format.kinds.activation import BEFORE
from loraplex_adapters.format.modules import ModulePaths, shown_modules, table_order
from loraplex_adapters.format.packing import packed_bytes
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import MAX_STAMP, MAX_STAMPS
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter, ModuleSpec
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import STAMP
from loraplex_adapters.format.values import scan

MAX_FINDINGS = 100
"""Findings that a report contains at most; a file can have 8,192 wrong tensors."""

_ACTIVATED = (
    "the adapter acts from the last occurrence of its invocation tokens in a prompt on; a prompt "
    "without them is answered by the base alone"
)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an examination: either a spec, or None and at least one finding."""

    spec: CheckedAdapter | None
    findings: tuple[Problem, ...]


def inspect(
    source: Path | Directory, base: BaseInfo, limits: AdapterLimits | None = None
) -> CheckedAdapter:
    """Checks the adapter in `source` as `examine` does; raises Refusal if there are findings.

    Reasons: ADAPTER_INVALID, ADAPTER_UNSUPPORTED, BASE_MODEL_MISMATCH, RANK_TOO_LARGE,
    ADAPTER_TOO_LARGE; FIELD_INVALID if a `source` path is not a directory. The spec covers every
    tensor of the file.
    """
    report = examine(source, base, limits)
    if report.spec is None:
        raise Refusal.of(report.findings)
    return report.spec


def examine_header(
    source: Path | Directory, base: BaseInfo, limits: AdapterLimits | None = None
) -> Report:
    """Does what `examine` does without reading the weights: the spec's digest stays empty."""
    return examine(source, base, limits, read_weights=False)


def examine(
    source: Path | Directory,
    base: BaseInfo,
    limits: AdapterLimits | None = None,
    *,
    read_weights: bool = True,
) -> Report:
    """Checks the adapter in `source` against `base` and reports everything that is wrong with it.

    The tensors' values are checked last, and only if nothing else is wrong. Without `read_weights`
    they are not checked, the spec's digest stays empty, and its copies are not compared. Raises
    Refusal(STORE_UNAVAILABLE) if no file descriptor is free.
    """
    limits = limits or AdapterLimits()
    unreadable: list[Problem] = []
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(opened(source))
        except Refusal as error:
            return Report(None, tuple(_of_files(error)))
        config = header = None
        size = 0
        try:
            config = directory.read_config()
        except Refusal as error:
            unreadable += _of_files(error)
        try:
            weights = stack.enter_context(directory.open_weights(limits.max_weights_bytes))
            size = weights.size
            header = read_header(weights.read, size)
        except Refusal as error:
            unreadable += _of_files(error)
        report = examine_parsed(config, header, size, base, limits)
        if unreadable or report.spec is None or not read_weights:
            spec = None if unreadable else report.spec
            # A type that is not served comes before what is wrong with its files.
            findings = led_by("peft_type", (*dict.fromkeys(unreadable), *report.findings))
            return Report(spec, tuple(findings))
        assert config is not None
        assert header is not None
        digest = AdapterDigest(config, size)
        spec = report.spec
        try:
            findings = scan(weights, header, digest, limits.max_abs_value)
            if not findings:
                spec, findings = settle(spec, weights.read, base, limits)
        except Refusal as error:
            findings = _of_files(error)
    if findings:
        return Report(None, tuple(grouped(findings, header.tensors)[:MAX_FINDINGS]))
    return Report(replace(spec, digest=digest.text()), ())


def _of_files(refusal: Refusal) -> list[Problem]:
    """The problems of an adapter's files. Raises `refusal` if it says nothing about the files."""
    if refusal.reason is Reason.STORE_UNAVAILABLE:
        raise refusal
    return list(refusal.problems)


def examine_parsed(
    config: bytes | None, header: Header | None, size: int, base: BaseInfo, limits: AdapterLimits
) -> Report:
    """Checks a configuration and the header of a weights file of `size` bytes.

    A file that could not be read is None and not checked; the report then has no spec. The spec's
    digest is empty, since it covers the weights, and its copies are not compared yet (`settle`).
    """
    if config is None:
        return Report(None, ())
    settings, findings = parse_config(config)
    if settings is None or header is None:
        return Report(None, tuple(findings[:MAX_FINDINGS]))
    provenance = {**_stamps(header.metadata, findings), **settings.provenance}
    _check_base(settings, header, base, findings)
    kind = settings.kind
    file = Placement(
        kind.peft_type, header, kind.endings, base, limits, kind.whole_names, kind.shared
    )
    modules = settings.reading.place(file)
    copies = [] if kind.whole_names else place_copies(file, modules)
    notes: tuple[str, ...] = ()
    if file.invocation_tokens:
        copies = [replace(copy, refusal=copy.refusal or BEFORE) for copy in copies]
        notes = (_ACTIVATED,)
    file.finish()
    findings += file.findings
    modules.sort(key=lambda m: table_order((m.layer, m.module)))
    _check_once(modules, file.path, findings)
    findings += check_size(without_copies(modules, copies), base, limits)
    if not modules and not findings:
        message = "the adapter changes nothing"
        findings.append(Problem(WEIGHTS_FILE, message, Reason.ADAPTER_INVALID))
    if findings:
        found = explained(findings, header.tensors, base)
        return Report(None, tuple(found[:MAX_FINDINGS]))
    spec = CheckedAdapter(
        digest="",
        peft_type=kind.peft_type,
        rank=max(m.rank for m in modules),
        target_modules=shown_modules(((m.layer, m.module) for m in modules), base),
        modules=tuple(modules),
        size_bytes=size,
        base_model=settings.base_model,
        virtual_tokens=max(_virtual_tokens(m) for m in modules),
        invocation_tokens=file.invocation_tokens,
        provenance=provenance,
        packed_bytes=packed_bytes(modules, base),
        copies=tuple(copies),
        twins=tuple(file.twins),
        notes=notes,
    )
    return Report(spec, ())


def _check_base(
    settings: Settings, header: Header, base: BaseInfo, findings: list[Problem]
) -> None:
    """Compares the fingerprints in configuration and weights file with the base's, if known."""
    stamps = (
        settings.provenance.get(FINGERPRINT_KEY.removeprefix(STAMP)),
        header.metadata.get(FINGERPRINT_KEY),
    )
    for stamp in stamps:
        if stamp and base.fingerprint and stamp != base.fingerprint:
            made_for = f"the adapter was made for the base {shown(stamp)}"
            message = f"{made_for}; this base is {base.fingerprint}"
            findings.append(Problem(FINGERPRINT_KEY, message, Reason.BASE_MODEL_MISMATCH))


def _stamps(metadata: Mapping[str, str], findings: list[Problem]) -> dict[str, str]:
    """The trainer's stamps in the weights file's metadata, by key without the prefix."""
    stamps = {key: text for key, text in metadata.items() if key.startswith(STAMP)}
    if len(stamps) > MAX_STAMPS:
        message = f"{WEIGHTS_FILE} has more than {MAX_STAMPS} stamps"
        findings.append(Problem("__metadata__", message, Reason.ADAPTER_INVALID))
        return {}
    return {shown(k.removeprefix(STAMP)): shown(v, MAX_STAMP) for k, v in stamps.items()}


def _check_once(modules: Sequence[ModuleSpec], path: ModulePaths, findings: list[Problem]) -> None:
    """Refuses two changes of one module, such as A and B together with saved rows."""
    for first, second in pairwise(modules):
        if (first.layer, first.module) == (second.layer, second.module):
            name = path((first.layer, first.module))
            message = f"{name} is changed in two ways at once, which is not supported"
            findings.append(Problem(name, message, Reason.ADAPTER_UNSUPPORTED))


def _virtual_tokens(module: ModuleSpec) -> int:
    tensor = module.tensors.get("prompt") or module.tensors.get("prefix")
    return tensor.shape[0] if tensor else 0
