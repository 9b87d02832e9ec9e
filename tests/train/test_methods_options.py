"""Options are read strictly, from typed values or from text, and all problems are told."""

from __future__ import annotations

from typing import Any

import pytest
from loraplex_model.base.refusal import Refusal
from loraplex_training.methods.options import Options


def test_text_and_values_mean_the_same() -> None:
    typed: dict[str, Any] = {
        "r": 16,
        "rate": 0.5,
        "bias": True,
        "kind": "b",
        "names": ["q", "v"],
        "layers": [0, 2, 4, 5, 6],
        "pattern": {"q": 4, "k": 8},
    }
    text = {
        "r": "16",
        "rate": "5e-1",
        "bias": "Yes",
        "kind": "b",
        "names": "q, v",
        "layers": "4-6,0,2",
        "pattern": "q=4, k=8",
    }
    for values in (typed, text, {**typed, "r": 16.0}):
        options = Options("method", values)
        assert options.integer("r", 1) == 16
        assert type(options.integer("r", 1)) is int
        assert options.number("rate", 1.0) == 0.5
        assert options.flag("bias", False) is True
        assert options.choice("kind", "a", ("a", "b")) == "b"
        assert options.names("names", ()) == ("q", "v")
        assert options.integers("layers", ()) == (0, 2, 4, 5, 6)
        assert options.mapping("pattern", whole=True) == {"q": 4, "k": 8}
        options.done()


def test_what_is_not_given_is_the_default() -> None:
    options = Options("method", {"given": None})
    assert not options.given("given")
    assert options.integer("r", 3, minimum=5) == 3
    assert options.names("names", ("q",)) == ("q",)
    assert options.mapping("pattern") == {}
    options.done()


@pytest.mark.parametrize("value", [True, 1.5, "1.5", "one", [1], float("nan"), "inf", "1" * 400])
def test_no_whole_numbers(value: object) -> None:
    options = Options("method", {"r": value})
    assert options.integer("r", 7) == 7
    with pytest.raises(Refusal, match=r"method: r is .*, which should be a whole number"):
        options.done()


@pytest.mark.parametrize("value", ["", "a=", "=3", "a=0", "a=-1", "a=x", "a=1,a=2", "a", 3, {1: 2}])
def test_no_mappings(value: object) -> None:
    options = Options("method", {"pattern": value})
    assert options.mapping("pattern") == {} or value == "a=1,a=2"
    if value == "":
        options.done()
        return
    with pytest.raises(Refusal, match="pattern"):
        options.done()


@pytest.mark.parametrize("value", ["1-", "3-1", "-1", "a", "", [], [1.5], 2.5, "0-99999999"])
def test_no_lists_of_layers(value: object) -> None:
    options = Options("method", {"layers": value})
    options.integers("layers", ())
    with pytest.raises(Refusal, match="layers"):
        options.done()


def test_all_problems_and_unknown_names() -> None:
    options = Options("lora", {"r": 0, "drop": 2, "flag": "perhaps", "ranks": 1, "kind": "c"})
    options.integer("r", 1, 1, 8)
    options.number("drop", 0.0, minimum=0, below=1)
    options.flag("flag", False)
    options.choice("kind", "aa", ("aa", "bb"))
    options.mapping("rank")
    options.refuse("r: does not fit")
    with pytest.raises(Refusal) as raised:
        options.done()
    assert raised.value.reason == "METHOD_INVALID"
    assert list(raised.value.messages) == [
        "lora: r is 0, which should be at least 1",
        "lora: drop is 2, which should be below 1",
        "lora: flag is 'perhaps', which should be true or false",
        "lora: kind is 'c', which should be one of aa, bb",
        "lora: r: does not fit",
        "lora: there is no option 'ranks' (did you mean 'rank'?); "
        "there are r, drop, flag, kind, rank",
    ]
