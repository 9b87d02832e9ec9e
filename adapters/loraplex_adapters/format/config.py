"""adapter_config.json, read key by key against the allow-list of its kind.

A key either means something here, or says nothing about the forward pass, or must be at the value
that leaves the forward pass as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraplex_model.base.refusal import Problem, Reason

from loraplex_adapters.format.files import CONFIG_FILE
from loraplex_adapters.format.kinds import KINDS, Kind, Plan
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.strict_json import loads, shown
from loraplex_adapters.format.support import COMMON, UNSERVED

FINGERPRINT_KEY = "loraplex_base_fingerprint"
"""The base's fingerprint, which our trainer stamps here or into the weights file's metadata."""

_SHOWN = ("base_model_name_or_path", "peft_version", "revision")


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration that was understood.

    Attributes:
        kind: by its `peft_type`.
        plan: what to expect of the weights file.
        provenance: stamps by key without "loraplex_", and what PEFT says of the origin.
        base_model: what it was trained on, as the trainer called it.
    """

    kind: Kind
    plan: Plan
    provenance: Mapping[str, str]
    base_model: str


def parse_config(data: bytes) -> tuple[Settings | None, list[Problem]]:
    """Reads adapter_config.json; no settings where it is too broken to hold the tensors against."""
    try:
        config = loads(data)
    except ValueError as error:
        return None, [Problem(CONFIG_FILE, f"{CONFIG_FILE} {error}", Reason.ADAPTER_INVALID)]
    if not isinstance(config, dict):
        return None, [
            Problem(CONFIG_FILE, f"{CONFIG_FILE} is no JSON object", Reason.ADAPTER_INVALID)
        ]
    reader = Reader(config)
    kind = _kind(reader)
    if kind is None:
        return None, reader.findings
    plan = kind.read(reader)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        reader.unsupported("task_type", "is not CAUSAL_LM")
    provenance = reader.stamps()
    texts = {key: reader.text(key) for key in _SHOWN}
    provenance.update({key: shown(text) for key, text in texts.items() if text})
    reader.check_keys({**COMMON, **kind.options})
    if plan is None:
        return None, reader.findings
    return Settings(kind, plan, provenance, shown(texts[_SHOWN[0]])), reader.findings


def _kind(reader: Reader) -> Kind | None:
    value = reader.config.get("peft_type")
    if isinstance(value, str) and value in KINDS:
        return KINDS[value]
    if not isinstance(value, str):
        given = "is missing"
    elif value in UNSERVED:
        given = f"is {value} ({UNSERVED[value]}), which is not served"
    else:
        given = f"is {shown(value)}, which is not known"
    reader.unsupported("peft_type", f"{given}; served are {', '.join(KINDS)}")
    return None
