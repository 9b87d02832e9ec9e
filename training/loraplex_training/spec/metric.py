"""Metrics of generated answers: the fraction that is right, by the rule that a job names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import regex
from loraplex_adapters.format.strict_json import loads
from loraplex_model.base.refusal import Reason, Refusal

RULES = ("exact", "json", "regex:<expression>")
SECONDS = 1.0
"""Time limit of an expression for one answer, in seconds; an answer beyond it is wrong."""

_Right = Callable[[str, str], bool]


def score(spec: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """Returns the fraction of right answers, from 0 to 1; 0 if there are no answers.

    Args:
        spec: "exact": the text equals the reference, white space at both ends apart. "json": both
            are the same JSON value; the order of keys and the layout do not matter. "regex:<expr>":
            the expression matches the whole stripped answer; the reference is ignored.

    Raises Refusal(CONFIG_INVALID) for another `spec`.
    """
    right = rule(spec)
    held = [right(a.strip(), r.strip()) for a, r in zip(answers, references, strict=True)]
    return sum(held) / len(held) if held else 0.0


def rule(spec: str) -> _Right:
    """Returns the function that compares an answer with its reference.

    Raises Refusal(CONFIG_INVALID) if `spec` is none of `RULES`.
    """
    if spec == "exact":
        return lambda answer, reference: answer == reference
    if spec == "json":
        return _same_json
    kind, separator, expression = spec.partition(":")
    if kind == "regex" and separator:
        try:
            pattern = regex.compile(expression, regex.DOTALL)
        except regex.error as error:
            raise Refusal(Reason.CONFIG_INVALID, f"the metric {spec!r}: {error}") from None
        return lambda answer, _: _matches(pattern, answer)
    raise Refusal(Reason.CONFIG_INVALID, f"the metric is one of {', '.join(RULES)}, not {spec!r}")


def _matches(pattern: regex.Pattern[str], answer: str) -> bool:
    try:
        return pattern.fullmatch(answer, timeout=SECONDS) is not None
    except TimeoutError:
        return False


def _same_json(answer: str, reference: str) -> bool:
    try:
        return _same(loads(answer.encode()), loads(reference.encode()))
    except ValueError:
        return False


def _same(a: object, b: object) -> bool:
    """Compares JSON values: 1.0 equals 1, true does not."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
