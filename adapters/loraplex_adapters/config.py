"""adapter_config.json: what PEFT 0.21 writes for LoRA, read key by key against an allow-list.

A key either means something here, or says nothing about the forward pass, or must be at the value
that leaves plain LoRA as it is. Nothing in the file is ever used as a regular expression, although
PEFT reads several of these keys as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loraplex_adapters.errors import Finding
from loraplex_adapters.files import CONFIG_FILE
from loraplex_adapters.patterns import Value, is_plain
from loraplex_adapters.strict_json import loads, shown
from loraplex_adapters.support import (
    INFORMATIONAL,
    MEANINGFUL,
    PLAIN_INITIALISATIONS,
    UNSUPPORTED,
    is_neutral,
    way_out,
)

FINGERPRINT_KEY = "loraplex_base_fingerprint"
"""The base's fingerprint, which our trainer stamps here or into the weights file's metadata."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A configuration that was understood.

    Attributes:
        rank_pattern, alpha_pattern: by plain module name or dotted suffix, in the file's order.
        target_modules: the listed names; None where the file has a regular expression.
        layers_to_transform: None transforms all.
        layers_pattern: names of the layer list; empty takes any.
        base_model: what it was trained on, as the trainer called it.
        base_fingerprint: the stamp, or "".
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    base_model: str = ""
    base_fingerprint: str = ""


def parse_config(data: bytes) -> tuple[LoraSettings | None, list[Finding]]:
    """Reads adapter_config.json; no settings where it is too broken to hold the tensors against."""
    try:
        config = loads(data)
    except ValueError as error:
        return None, [Finding("ADAPTER_INVALID", f"{CONFIG_FILE} {error}", CONFIG_FILE)]
    if not isinstance(config, dict):
        return None, [Finding("ADAPTER_INVALID", f"{CONFIG_FILE} is no JSON object", CONFIG_FILE)]
    reader = _Reader(config)
    kind = config.get("peft_type")
    if kind != "LORA":
        given = f"is {shown(kind)}" if isinstance(kind, str) else "is missing"
        reader.unsupported("peft_type", f"{given}; served is LORA")
        return None, reader.findings
    settings = reader.settings()
    reader.check_initialisation()
    reader.check_task()
    reader.check_other_keys()
    return settings, reader.findings


class _Reader:
    """Takes values out of the configuration; what is wrong with them goes to `findings`."""

    def __init__(self, config: dict[str, object]) -> None:
        self.config = config
        self.findings: list[Finding] = []

    def settings(self) -> LoraSettings | None:
        rank = self.rank("r", self.config.get("r"))
        alpha = self.alpha("lora_alpha", self.config.get("lora_alpha"))
        settings = LoraSettings(
            r=rank or 0,
            lora_alpha=alpha or 0.0,
            use_rslora=self.flag("use_rslora"),
            rank_pattern=self.pattern("rank_pattern", self.rank),
            alpha_pattern=self.pattern("alpha_pattern", self.alpha),
            target_modules=self.targets(),
            exclude_modules=self.excluded(),
            layers_to_transform=self.layers(),
            layers_pattern=self.names("layers_pattern"),
            base_model=self.text("base_model_name_or_path"),
            base_fingerprint=self.text(FINGERPRINT_KEY),
        )
        return None if rank is None or alpha is None else settings

    def check_initialisation(self) -> None:
        value = self.config.get("init_lora_weights")
        if value is None or isinstance(value, bool):
            return
        if not isinstance(value, str):
            self.invalid("init_lora_weights", "is neither a boolean nor a name")
        elif value not in PLAIN_INITIALISATIONS:
            self.unsupported(
                "init_lora_weights",
                f"is {shown(value)}, which may change the base, so that A and B are not the whole "
                f"delta; {way_out(value)}",
            )

    def check_task(self) -> None:
        if self.config.get("task_type") not in (None, "CAUSAL_LM"):
            self.unsupported("task_type", "is not CAUSAL_LM")

    def check_other_keys(self) -> None:
        known = MEANINGFUL | INFORMATIONAL | {FINGERPRINT_KEY}
        for key, value in self.config.items():
            if key in known or is_neutral(key, value):
                continue
            if key in UNSUPPORTED:
                self.unsupported(key, f"asks for {UNSUPPORTED[key]}, which is not served")
            else:
                self.unsupported(key, "is not known and not empty, so it may change the result")

    def rank(self, key: str, value: object) -> int | None:
        if type(value) is int and value >= 1:
            return value
        self.invalid(key, "needs an integer rank of at least 1")
        return None

    def alpha(self, key: str, value: object) -> float | None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)  # finite: the parser takes no other numbers
        self.invalid(key, "needs a number")
        return None

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.invalid(key, "is not a boolean")
        return False

    def text(self, key: str) -> str:
        value = self.config.get(key)
        if value is None or isinstance(value, str):
            return value or ""
        self.invalid(key, "is not a string")
        return ""

    def pattern(self, key: str, read: Callable[[str, object], Value | None]) -> dict[str, Value]:
        """A map whose keys are plain module names; PEFT runs them as regular expressions."""
        value = self.config.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.invalid(key, "is not a map")
            return {}
        plain: dict[str, Value] = {}
        for name, item in value.items():
            if not is_plain(name):
                self.unsupported(key, f"has the key {shown(name)}, which is no plain module name")
            elif (understood := read(key, item)) is not None:
                plain[name] = understood
        return plain

    def names(self, key: str) -> tuple[str, ...]:
        """Plain names, given as a list or one string."""
        value = self.config.get(key)
        if value is None:
            return ()
        names = [value] if isinstance(value, str) and value else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.invalid(key, "is neither a name nor a list of names")
            return ()
        if odd := [name for name in names if not is_plain(name)]:
            self.unsupported(key, f"has {shown(odd[0])}, which is no plain module name")
            return ()
        return tuple(names)

    def targets(self) -> tuple[str, ...] | None:
        """The target list. A string is a regular expression; the tensors say what it matched."""
        value = self.config.get("target_modules")
        if isinstance(value, str) and value:
            return None
        if not value:
            self.invalid("target_modules", "names no module")
        return self.names("target_modules")

    def excluded(self) -> tuple[str, ...]:
        """The names that PEFT leaves out. A string has to match a whole path, unlike a list's."""
        value = self.config.get("exclude_modules")
        names = self.names("exclude_modules")
        return names if not isinstance(value, str) or value.startswith("model.") else ()

    def layers(self) -> frozenset[int] | None:
        value = self.config.get("layers_to_transform")
        layers = [value] if type(value) is int else value
        if layers is None or layers == []:
            return None
        if isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers):
            return frozenset(layers)
        self.invalid("layers_to_transform", "is neither a layer's number nor a list of them")
        return None

    def invalid(self, key: str, problem: str) -> None:
        self.findings.append(Finding("ADAPTER_INVALID", f"{key} {problem}", key))

    def unsupported(self, key: str, problem: str) -> None:
        field = shown(key)
        self.findings.append(Finding("ADAPTER_UNSUPPORTED", f"{field} {problem}", field))
