"""Reads adapter_config.json key by key, with the table of options of its kind.

A key is either served, or has no effect on the forward pass, or must have the value that leaves the
forward pass unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_adapters.format.files import CONFIG_FILE, refused
from loraplex_adapters.format.foreign.folder import CONVERT, HEAD_BYTES, cause_in
from loraplex_adapters.format.kinds import KINDS, Kind, Reading
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.strict_json import loads, shown
from loraplex_adapters.format.support import COMMON, OTHERS, UNSERVED

FINGERPRINT_KEY = "loraplex_base_fingerprint"
"""Key of the base's fingerprint in the configuration or in the weights file's metadata."""

_SHOWN = ("base_model_name_or_path", "peft_version", "revision")


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration that could be read.

    Attributes:
        kind: the kind that `peft_type` names.
        reading: the kind's options, by which the tensors are placed.
        provenance: stamps by key without "loraplex_", and PEFT's entries about the origin.
        base_model: name of the base that the adapter was trained on, according to the file.
    """

    kind: Kind
    reading: Reading
    provenance: Mapping[str, str]
    base_model: str


def load_config(data: bytes) -> dict[str, Any]:
    """Parses adapter_config.json; raises Refusal(ADAPTER_INVALID) unless it is a JSON object."""
    if (cause := cause_in(data[:HEAD_BYTES], CONFIG_FILE, text=True)) is not None:
        raise refused(cause)
    try:
        config = loads(data)
    except ValueError as error:
        raise Refusal(Reason.ADAPTER_INVALID, f"{CONFIG_FILE} {error}", CONFIG_FILE) from None
    if not isinstance(config, dict):
        message = f"{CONFIG_FILE} is not a JSON object"
        raise Refusal(Reason.ADAPTER_INVALID, message, CONFIG_FILE)
    return config


def parse_config(data: bytes) -> tuple[Settings | None, list[Problem]]:
    """Reads adapter_config.json; returns no settings if the tensors cannot be placed by it."""
    try:
        config = load_config(data)
    except Refusal as error:
        return None, list(error.problems)
    reader = Reader(config)
    kind = _kind(reader)
    if kind is None:
        return None, reader.findings
    reading = kind.read(reader)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        reader.unsupported("task_type", "is not CAUSAL_LM")
    provenance = reader.stamps()
    texts = {key: reader.text(key) for key in _SHOWN}
    provenance.update({key: shown(text) for key, text in texts.items() if text})
    reader.check_keys({**OTHERS, **COMMON, **kind.options})
    if reading is None:
        return None, reader.findings
    return Settings(kind, reading, provenance, shown(texts[_SHOWN[0]])), reader.findings


def _kind(reader: Reader) -> Kind | None:
    value = reader.config.get("peft_type")
    if isinstance(value, str) and value in KINDS:
        return KINDS[value]
    if value is None and (other := _other_program(reader.config)):
        reader.unsupported("peft_type", f"is missing: {other}")
        return None
    if not isinstance(value, str):
        given = "is missing"
    elif value in UNSERVED:
        given = f"is {value} ({UNSERVED[value]}), which is not supported"
    else:
        given = f"is {shown(value)}, which is unknown"
    reader.unsupported("peft_type", f"{given}; supported are {', '.join(KINDS)}")
    return None


def _other_program(config: Mapping[str, object]) -> str:
    """Which program's configuration this is, and what to do; "" if it is not known."""
    if "fine_tune_type" in config or "lora_parameters" in config:
        return f"this is the configuration of an MLX adapter; {CONVERT}"
    if isinstance(config.get("config"), dict) and "model_type" in config:
        command = "loraplex-server convert --from adapterhub"
        return f"this is a configuration of AdapterHub; the operator can convert it: {command}"
    if "architectures" in config or "hidden_size" in config:
        return f"this is a model's config.json, not the {CONFIG_FILE} that PEFT writes"
    return ""
