"""How good generated answers are: the share of them that is right, by a rule that a job names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import regex
from loraplex_adapters.format.strict_json import loads
from loraplex_model.base.refusal import Reason, Refusal

RULES = ("exact", "json", "regex:<expression>")
SECONDS = 1.0
"""What an expression may take for one answer; beyond that the answer is wrong."""

_Right = Callable[[str, str], bool]


def score(spec: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are right, from 0 to 1; 0 where there are none.

    Args:
        spec: "exact": the text is the reference's, but for white space at both ends. "json": both
            are one JSON value; the order of keys and the layout do not matter. "regex:<expr>": the
            expression matches the whole stripped answer, whatever the reference.

    Raises Refusal(CONFIG_INVALID) for another `spec`.
    """
    right = rule(spec)
    held = [right(a.strip(), r.strip()) for a, r in zip(answers, references, strict=True)]
    return sum(held) / len(held) if held else 0.0


def rule(spec: str) -> _Right:
    """The function from an answer and its reference to whether it is right.

    Raises Refusal(CONFIG_INVALID) where `spec` is none of `RULES`.
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
    """Equality of JSON values: true is not 1, but 1.0 is."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
