"""What counts as a right answer."""

from __future__ import annotations

import time

import pytest
from loraplex_model.base.refusal import Refusal
from loraplex_training.spec.metric import SECONDS, score


@pytest.mark.parametrize(
    ("spec", "answer", "reference", "right"),
    [
        ("exact", " yes\n", "yes", True),
        ("exact", "Yes", "yes", False),
        ("exact", "yes.", "yes", False),
        ("exact", "", "yes", False),
        ("json", '{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1.0}', True),
        ("json", '{"a": 1}', '{"a": true}', False),
        ("json", "[1, 2]", "[2, 1]", False),
        ("json", "[1]", "[1, 1]", False),
        ("json", '{"a": 1} ', '{"a": 1, "b": 2}', False),
        ("json", '{"a": 1, "a": 1}', '{"a": 1}', False),
        ("json", 'Here: {"a": 1}', '{"a": 1}', False),
        ("json", "[" * 100_000, "[]", False),
        ("regex:[a-z]+", "abc", "whatever", True),
        ("regex:[a-z]+", "abc1", "abc1", False),
        ("regex:a.*b", "a\nb", "", True),
        ("regex:a:b", "a:b", "", True),
    ],
)
def test_an_answer_is_right_or_not(spec: str, answer: str, reference: str, right: bool) -> None:
    assert score(spec, [answer], [reference]) == float(right)


def test_the_score_is_the_share_of_right_answers() -> None:
    assert score("exact", ["a", "b", "c", "d"], ["a", "x", "y", "d"]) == 0.5
    assert score("exact", [], []) == 0.0


def test_answers_and_references_go_in_pairs() -> None:
    with pytest.raises(ValueError, match="longer"):
        score("exact", ["a"], ["a", "b"])


@pytest.mark.parametrize("spec", ["", "regex", "regex:(", "exactly", "Exact"])
def test_another_metric_is_refused(spec: str) -> None:
    with pytest.raises(Refusal) as caught:
        score(spec, ["a"], ["a"])
    assert caught.value.reason == "CONFIG_INVALID"


def test_an_expression_that_runs_away_is_stopped_and_the_answer_wrong() -> None:
    begun = time.monotonic()
    assert score(r"regex:(a|aa)+b(?<!\1)", ["a" * 60], [""]) == 0.0
    assert time.monotonic() - begun < 60 * SECONDS  # or for ever
