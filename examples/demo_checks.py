"""The claims of the demo, as functions from observed answers and metrics to results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from loraplex import Completion
from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""One scrape: `(sample name, sorted labels)` to value."""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, whether it held, and the observation."""

    claim: str
    held: bool
    seen: str


@dataclass(frozen=True, slots=True)
class Steps:
    """Engine steps between two scrapes.

    Attributes:
        total: number of steps.
        by_distinct: number of steps by the number of different adapters in a step.
        with_base: number of steps with a row of the base without an adapter.
    """

    total: int
    by_distinct: Mapping[int, int]
    with_base: int

    @property
    def most_distinct(self) -> int:
        return max((n for n, steps in self.by_distinct.items() if steps), default=0)

    def certainly_mixed(self, adapters: int) -> int:
        """Number of steps that must have had `adapters` different adapters and also a base row.

        If two sets of steps have more members than there are steps in total, they share the
        surplus.
        """
        several = sum(steps for n, steps in self.by_distinct.items() if n >= adapters)
        return max(0, several + self.with_base - self.total)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What OpenAI's interface answered: the text, and the adapter that the header names."""

    text: str
    adapter: str


def is_pirate(text: str) -> bool:
    """Whether the text is a pirate's answer: these all start with "Arr"."""
    return text.lstrip().startswith("Arr")


def is_json(text: str) -> bool:
    """Whether the text is a JSON object with exactly a topic and an answer, both text."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and value.keys() == {"topic", "answer"}
        and all(isinstance(part, str) and part for part in value.values())
    )


BEHAVIOUR = {"pirate": ("talks like a pirate", is_pirate), "json": ("answers in JSON", is_json)}
"""By adapter name: the behaviour that the adapter adds, and the test for it."""


def over_http(answer: HttpAnswer, same: Completion) -> Check:
    """The answer over HTTP is the one over gRPC, by the same adapter's bytes."""
    wanted = " ".join(f"{each.name}@{each.version} {each.digest}" for each in same.adapters)
    held = answer.text == same.text != "" and answer.adapter == wanted
    return Check("OpenAI's interface gives the same answer", held, answer.adapter[:40])


def behaviour(answers: Mapping[str, Completion]) -> list[Check]:
    """Each adapter shows the behaviour that it was trained for, and "base" does not."""
    checks = []
    for name, (manner, shows) in BEHAVIOUR.items():
        adapted, base = answers[name].text, answers["base"].text
        checks.append(Check(f"{name} {manner}", shows(adapted), repr(adapted[:40])))
        checks.append(Check(f"the base does not: {manner}", not shows(base), repr(base[:40])))
    return checks


def digests(answers: Mapping[str, Completion], expected: Mapping[str, str]) -> list[Check]:
    """Every answer names exactly the digest of its adapter's files; the base's names none."""
    checks = []
    for name, answer in answers.items():
        wanted = [expected[name]] if name in expected else []
        got = [adapter.digest for adapter in answer.adapters]
        seen = ", ".join(digest[:19] for digest in got) or "no adapter"
        checks.append(Check(f"{name} was answered by its own weights", got == wanted, seen))
    return checks


def same_as_alone(
    together: Mapping[str, Completion], alone: Mapping[str, Completion]
) -> list[Check]:
    """The batch changed no token of any answer."""
    checks = []
    for name, answer in together.items():
        same = bool(answer.token_ids) and answer.token_ids == alone[name].token_ids
        seen = f"{len(answer.token_ids)} tokens, alone {len(alone[name].token_ids)}"
        checks.append(Check(f"{name} in the batch equals {name} alone", same, seen))
    return checks


def one_batch(steps: Steps, adapters: int) -> Check:
    """At least one step computed rows of all adapters and of the base together."""
    mixed = steps.certainly_mixed(adapters)
    return Check(
        f"{adapters} adapters and the base shared a step", mixed > 0, f"{mixed} such steps at least"
    )


def parse_metrics(text: str) -> Samples:
    """Parses a scrape in Prometheus' text format."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def steps_between(before: Samples, after: Samples) -> Steps:
    """The engine steps between two scrapes, from the increase of the histograms."""
    distinct = _gained(before, after, "loraplex_batch_distinct_adapters", {})
    base = _gained(before, after, "loraplex_batch_rows", {"kind": "base"})
    total = sum(distinct.values())
    return Steps(total, distinct, total - base.get(0, 0))


def _gained(
    before: Samples, after: Samples, histogram: str, labels: Mapping[str, str]
) -> dict[int, int]:
    """Increase of each bucket by its upper bound; the overflow bucket is left out."""
    cumulative = {}
    for (name, pairs), value in after.items():
        own = dict(pairs)
        if name == f"{histogram}_bucket" and own.pop("le") and own == labels:
            bound = float(dict(pairs)["le"])
            cumulative[bound] = round(value - before.get((name, pairs), 0.0))
    bounds = sorted(cumulative)
    below = dict(zip(bounds, [0, *(cumulative[bound] for bound in bounds)], strict=False))
    return {int(b): cumulative[b] - below[b] for b in bounds if math.isfinite(b)}
