"""Reads a PEFT adapter directory and decides whether this base can serve it. Imports no torch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex_model.config import PROJECTIONS

from loraplex_adapters.config import LoraSettings, parse_config
from loraplex_adapters.digest import AdapterDigest
from loraplex_adapters.errors import AdapterError, Finding
from loraplex_adapters.files import WEIGHTS_FILE, Directory, open_directory
from loraplex_adapters.placement import place
from loraplex_adapters.safetensors_header import Header, read_header
from loraplex_adapters.spec import AdapterSpec, BaseShapes, Limits, ModuleSpec
from loraplex_adapters.strict_json import shown
from loraplex_adapters.values import scan

MAX_FINDINGS = 100
"""A report ends here; a file of 8,192 wrong tensors has been described well enough by then."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an examination found: the spec, which is None exactly when there are findings."""

    spec: AdapterSpec | None
    findings: tuple[Finding, ...]


def inspect(
    source: Path | Directory,
    base: BaseShapes,
    limits: Limits | None = None,
    *,
    check_values: bool = True,
) -> AdapterSpec:
    """As `examine`, but raises AdapterError for the findings.

    Reasons: ADAPTER_INVALID, ADAPTER_UNSUPPORTED, BASE_MODEL_MISMATCH, RANK_TOO_LARGE,
    ADAPTER_TOO_LARGE; FIELD_INVALID when a `source` path is no directory. No tensor is left out:
    everything that the file holds is in the spec, or this raises.
    """
    report = examine(source, base, limits, check_values=check_values)
    if report.spec is None:
        raise AdapterError.of(report.findings)
    return report.spec


def examine(
    source: Path | Directory,
    base: BaseShapes,
    limits: Limits | None = None,
    *,
    check_values: bool = True,
) -> Report:
    """Checks the adapter in `source` against `base` and lists everything that is wrong with it.

    The elements are looked at last, and only where nothing else is wrong; `check_values=False`
    leaves that out, for bytes that passed it before.
    """
    limits = limits or Limits()
    return _examine(source, base, limits, limits.max_abs_value if check_values else None)


def survey(source: Path | Directory, base: BaseShapes, limits: Limits | None = None) -> Report:
    """`examine` as far as it goes without reading the weights: the spec's digest stays empty."""
    return _examine(source, base, limits or Limits(), None, read_weights=False)


def judge(
    config: bytes | None, header: Header | None, size: int, base: BaseShapes, limits: Limits
) -> Report:
    """Decides from the configuration and the header of a weights file of `size` bytes.

    What could not be read is None and not judged. The spec's digest is empty: it is over all bytes.
    """
    settings: LoraSettings | None = None
    findings: list[Finding] = []
    modules: tuple[ModuleSpec, ...] = ()
    if config is not None:
        settings, findings = parse_config(config)
    if settings is not None and header is not None:
        modules, misplaced = place(header, settings, base, limits)
        findings += misplaced
    if findings or settings is None or not modules:
        return Report(None, tuple(findings[:MAX_FINDINGS]))
    targets = {m.module for m in modules}
    spec = AdapterSpec(
        digest="",
        peft_type="LORA",
        rank=max(m.rank for m in modules),
        target_modules=tuple(name for name in PROJECTIONS if name in targets),
        modules=modules,
        size_bytes=size,
        base_model=shown(settings.base_model),
    )
    packed = spec.packed_bytes(base.dtype)
    if limits.max_device_bytes is not None and packed > limits.max_device_bytes:
        message = f"needs {packed} bytes on the device; there are {limits.max_device_bytes}"
        return Report(None, (Finding("ADAPTER_TOO_LARGE", message, WEIGHTS_FILE),))
    return Report(spec, ())


def _examine(
    source: Path | Directory,
    base: BaseShapes,
    limits: Limits,
    max_abs_value: float | None,
    read_weights: bool = True,
) -> Report:
    unreadable: list[Finding] = []
    with ExitStack() as opened:
        try:
            directory = (
                source
                if isinstance(source, Directory)
                else opened.enter_context(open_directory(source))
            )
        except AdapterError as error:
            return Report(None, error.findings)
        config = header = None
        size = 0
        try:
            with directory.open_config() as file:
                config = file.read(0, file.size)
        except AdapterError as error:
            unreadable += error.findings
        try:
            weights = opened.enter_context(directory.open_weights(limits.max_weights_bytes))
            size = weights.size
            header = read_header(weights.read, size)
        except AdapterError as error:
            unreadable += error.findings
        report = judge(config, header, size, base, limits)
        if unreadable or report.spec is None or not read_weights:
            spec = None if unreadable else report.spec
            return Report(spec, (*unreadable, *report.findings))
        assert config is not None
        assert header is not None
        digest = AdapterDigest(config, size)
        try:
            findings = scan(weights, header, digest, max_abs_value)
        except AdapterError as error:
            findings = list(error.findings)
    if findings:
        return Report(None, tuple(findings[:MAX_FINDINGS]))
    return Report(replace(report.spec, digest=digest.text()), ())
