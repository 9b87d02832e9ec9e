"""What `loraplex-server doctor --adapter` says of an adapter: the check of a registration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_adapters.format.config import FINGERPRINT_KEY
from loraplex_adapters.format.examine import Report, examine_header
from loraplex_adapters.format.examine import examine as examine_values
from loraplex_adapters.format.files import open_directory
from loraplex_adapters.format.foreign.notes import MAX_NOTED_FILES, folder_notes
from loraplex_adapters.format.spec import CheckedAdapter
from loraplex_adapters.format.support import STAMP
from loraplex_model.base.info import BaseInfo

from loraplex_server.commands.checks import Check, adapter_limits
from loraplex_server.config import Config

if TYPE_CHECKING:
    from loraplex_model.checkpoints.outlook.base import BaseOutlook

_SHOWN: Final = 5
_STAMPED: Final = FINGERPRINT_KEY.removeprefix(STAMP)


def examine(config: Config, found: BaseOutlook, directory: Path) -> Iterator[Check]:
    """Checks an adapter against a base model, which need not have been converted."""
    base = BaseInfo(
        found.config, found.fingerprint, config.dtype, weights_file=found.weights_file
    ).named(config.model)
    limits = adapter_limits(config)
    report = examine_header(directory, base, limits)
    copies = report.spec.copies if report.spec is not None else ()
    if not copies or found.entry is not None:
        report = examine_values(directory, base, limits)
    if report.spec is None:
        yield from _refused(directory, report)
        return
    spec, later = report.spec, []
    if found.entry is None and spec.provenance.get(_STAMPED):
        later.append("the base that it was trained on")
    if spec.copies:
        later.append(f"the values, and {len(spec.copies)} tensors that may equal the base's own")
    yield Check("adapter", f"{directory}: {_summary(spec)}{_compared(later)}")
    with open_directory(directory) as opened:
        notes = folder_notes(opened.names(MAX_NOTED_FILES), False)
    yield from (Check("adapter", f"{directory}: note: {note}") for note in (*notes, *spec.notes))


def _refused(directory: Path, report: Report) -> Iterator[Check]:
    for problem in report.findings[:_SHOWN]:
        yield Check("adapter", f"{directory}: {problem.reason}: {problem.message}", good=False)
    if (more := len(report.findings) - _SHOWN) > 0:
        yield Check("adapter", f"{directory}: {more} further findings", good=False)


def _summary(spec: CheckedAdapter) -> str:
    parts = [f"{spec.peft_type} will be served"]
    if spec.rank:
        parts.append(f"rank {spec.rank}")
    if spec.virtual_tokens:
        parts.append(f"{spec.virtual_tokens} virtual tokens")
    parts.append(f"{spec.packed_bytes / 1e6:.3g} MB on the device")
    if spec.target_modules:
        parts.append(f"changes {', '.join(spec.target_modules)}")
    return ", ".join(parts)


def _compared(later: Sequence[str]) -> str:
    return f"; compared once the model is converted: {'; '.join(later)}" if later else ""
