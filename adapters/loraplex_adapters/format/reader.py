"""Reads typed values from a configuration; wrong values become findings.

Nothing in the file is ever given to Python's `re`, although PEFT does so with several keys; see
`format.expressions`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from loraplex_model.base.refusal import Problem, Reason

from loraplex_adapters.format.expressions.automaton import Expression, Work, ending
from loraplex_adapters.format.expressions.grammar import NotEvaluated
from loraplex_adapters.format.patterns import MAX_EXPRESSIONS, is_plain
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import STAMP, Option, Support, is_neutral
from loraplex_adapters.format.targets import Named, Targets

MAX_STAMPS = 64
MAX_STAMP = 512
"""Most stamps of one file, and most characters kept of each."""

MAX_SAVED = 64
"""Most names in `modules_to_save`, since each is compared with every module."""

MAX_PATTERNS = 16
"""Most entries of `layers_pattern`."""

_REMOVE = "remove the key if only the trainer used it"
_NAMES = "write the modules' names instead"

Read = TypeVar("Read")


class Reader:
    """Reader of one configuration. For a wrong value, methods add a finding and return a default.

    Attributes:
        config: the configuration.
        findings: everything that is wrong with it, in order of discovery.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config
        self.findings: list[Problem] = []

    def integer(self, key: str) -> int | None:
        """A required integer of at least 1."""
        return self.as_integer(key, self.config.get(key))

    def optional_integer(self, key: str) -> int | None:
        """An integer of at least 1; None if the key is null or missing."""
        return None if self.config.get(key) is None else self.integer(key)

    def as_integer(self, key: str, value: object) -> int | None:
        """`value`, found under `key`, as an integer of at least 1."""
        if type(value) is int and value >= 1:
            return value
        self.invalid(key, "needs an integer of at least 1")
        return None

    def number(self, key: str, default: float | None = None) -> float | None:
        """A finite number, which is required if there is no default."""
        value = self.config.get(key)
        return default if value is None and default is not None else self.as_number(key, value)

    def as_number(self, key: str, value: object) -> float | None:
        """`value`, found under `key`, as a finite number."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)  # finite, as the parser accepts no other numbers
        self.invalid(key, "needs a number")
        return None

    def flag(self, key: str) -> bool:
        """A boolean; False if the key is null or missing."""
        value = self.config.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.invalid(key, "is not a boolean")
        return False

    def text(self, key: str) -> str:
        """A string; "" if the key is null or missing."""
        value = self.config.get(key)
        if value is None or isinstance(value, str):
            return value or ""
        self.invalid(key, "is not a string")
        return ""

    def choice(self, key: str, choices: Mapping[str, Read], default: Read) -> Read:
        """The value of one of the words `choices`; the default if the key is null or missing."""
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, str) and value in choices:
            return choices[value]
        self.unsupported(key, f"is not one of {', '.join(choices)}")
        return default

    def pattern(self, key: str, read: Callable[[str, object], Read | None]) -> dict[str, Read]:
        """A map whose keys are plain module names, or expressions for ends of their paths.

        `read` converts a value of the map; None leaves the entry out.
        """
        value = self.config.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.invalid(key, "is not a map")
            return {}
        found: dict[str, Read] = {}
        others = [name for name in value if not is_plain(name)]
        if len(others) > MAX_EXPRESSIONS:
            count = f"{len(others)} keys that are expressions; at most {MAX_EXPRESSIONS} are"
            self.unsupported(key, f"has {count} evaluated: {_NAMES}")
            return {}
        if not self._understood(key, others, "the key "):
            return {}
        for name, item in value.items():
            if (understood := read(key, item)) is not None:
                found[name] = understood
        return found

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
            self.unsupported(key, f"has {shown(odd[0])}, which is not a plain module name")
            return ()
        return tuple(names)

    def token_ids(
        self, key: str, value: object, *, distinct: bool = True
    ) -> tuple[int, ...] | None:
        """`value`, found under `key`, as a list of token ids in the file's order, not empty.

        If they must be `distinct`, a token id that occurs twice is invalid.
        """
        if not isinstance(value, list) or not value:
            self.invalid(key, "is not a list of token ids")
        elif not all(type(item) is int and item >= 0 for item in value):
            self.invalid(key, "has a token id that is not an integer of at least 0")
        elif distinct and len(set(value)) < len(value):
            self.invalid(key, "has a token id twice")
        else:
            return tuple(value)
        return None

    def targets(self) -> Targets:
        """`target_modules` with the options that narrow or widen it."""
        return Targets(
            names=self._target_names(),
            excluded=self._excluded(),
            layers=self._layers(),
            layers_pattern=self._layers_pattern(),
            saved=self._saved(),
            tied=self.flag("ensure_weight_tying"),
        )

    def check_keys(self, options: Mapping[str, Option]) -> None:
        """Adds a finding for every key that could change the result and is not served."""
        for key, value in self.config.items():
            if key.startswith(STAMP):
                continue
            option = options.get(key)
            if option and option.support is not Support.REFUSED:
                continue
            if is_neutral(key, value):
                continue
            if option:
                self.unsupported(key, f"is set ({option.note}), which is not supported")
            else:
                effect = "so it could change the result"
                self.unsupported(key, f"is unknown and not empty, {effect}; {_REMOVE}")

    def stamps(self) -> dict[str, str]:
        """The trainer's stamps in the configuration, by key without the prefix."""
        found: dict[str, str] = {}
        for key, value in self.config.items():
            if not key.startswith(STAMP) or value is None:
                continue
            if isinstance(value, str):
                found[shown(key.removeprefix(STAMP))] = shown(value, MAX_STAMP)
            elif key.removeprefix(STAMP) != "base_fingerprint" and isinstance(value, int | float):
                found[shown(key.removeprefix(STAMP))] = str(value)
            else:
                self.invalid(key, "is not a string")
        if len(found) > MAX_STAMPS:
            self.invalid(max(found), f"is one of more than {MAX_STAMPS} stamps")
        return found

    def invalid(self, key: str, problem: str) -> None:
        """Adds the finding that the value of `key` is invalid."""
        field = shown(key)
        self.findings.append(Problem(field, f"{field} {problem}", Reason.ADAPTER_INVALID))

    def unsupported(self, key: str, problem: str) -> None:
        """Adds the finding that the value of `key` is not supported here."""
        field = shown(key)
        self.findings.append(Problem(field, f"{field} {problem}", Reason.ADAPTER_UNSUPPORTED))

    def _target_names(self) -> tuple[str, ...] | Expression | Named:
        """`target_modules`: a list of names, an expression, or the word "all-linear"."""
        value = self.config.get("target_modules")
        if isinstance(value, str) and value:
            if value.lower() == Named.ALL_LINEAR.value:
                return Named.ALL_LINEAR
            return self._expression("target_modules", value) or Named.UNKNOWN
        if not value and not self.config.get("target_parameters"):
            self.invalid("target_modules", "names no module")
        names = self.names("target_modules")
        return names or Named.UNKNOWN

    def _excluded(self) -> tuple[str, ...] | Expression:
        """What PEFT excludes: ends of paths, compared as text, or an expression for whole paths."""
        value = self.config.get("exclude_modules")
        if isinstance(value, str) and value:
            return self._expression("exclude_modules", value) or ()
        if not value:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.invalid("exclude_modules", "is neither a list of names nor an expression")
            return ()
        return tuple(value)

    def _layers_pattern(self) -> tuple[str, ...]:
        """Names of the list of layers, or expressions for it."""
        key = "layers_pattern"
        value = self.config.get(key)
        patterns = [value] if isinstance(value, str) and value else value or []
        if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
            self.invalid(key, "is neither a name nor a list of names")
        elif len(patterns) > MAX_PATTERNS:
            self.unsupported(key, f"has more than {MAX_PATTERNS} entries")
        elif self._understood(key, [name for name in patterns if not is_plain(name)]):
            return tuple(patterns)
        return ()

    def _expression(self, key: str, text: str) -> Expression | None:
        """An expression for whole paths; None, with a finding, if it is not understood."""
        return Expression(text) if self._understood(key, [text]) else None

    def _understood(self, key: str, texts: Collection[str], what: str = "") -> bool:
        """Whether all expressions of a field can be evaluated; if not, there is a finding."""
        work = Work()
        for text in texts:
            try:
                if not text or not text.isprintable():
                    raise NotEvaluated("is empty or not printable")
                work.spend(len(text))
                work.spend(ending(text).size)
            except NotEvaluated as error:
                self.unsupported(key, f"has {what}{shown(text)}, which {error}; {_NAMES}")
                return False
        return True

    def _saved(self) -> tuple[str, ...]:
        names = self.names("modules_to_save")
        if len(names) > MAX_SAVED:
            self.unsupported("modules_to_save", f"has more than {MAX_SAVED} names")
            return ()
        return names

    def _layers(self) -> frozenset[int] | None:
        value = self.config.get("layers_to_transform")
        layers = [value] if type(value) is int else value
        if layers is None or layers == []:
            return None
        if isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers):
            return frozenset(layers)
        self.invalid("layers_to_transform", "is neither a layer number nor a list of them")
        return None
