"""Options are read strictly, from typed values or from text, and all problems are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pytest
from loraplex_model.base.refusal import Refusal
from loraplex_training.methods.options import (
    Alphas,
    Layers,
    MethodOptions,
    Names,
    OptionProblems,
    Ranks,
)
from loraplex_training.spec import fields
from pydantic import Field


class Sample(MethodOptions):
    """One option of each type."""

    r: Annotated[fields.Whole, Field(ge=1, le=64)] = 7
    rate: Annotated[fields.Number, Field(ge=0, lt=1)] = 0.25
    bias: bool = False
    kind: Annotated[str, fields.one_of(("aa", "bb"))] = "aa"
    names: Names = ("q",)
    layers: Layers = ()
    ranks: Annotated[Ranks, Field(default_factory=dict)]
    alphas: Annotated[Alphas, Field(default_factory=dict)]


def read(values: Mapping[str, object]) -> Sample:
    """Raises Refusal METHOD_INVALID with every problem, as a method does."""
    options, found = fields.read(Sample, values, "method")
    OptionProblems("method", found).check()
    assert options is not None
    return options


def refused(values: Mapping[str, object]) -> tuple[str, ...]:
    with pytest.raises(Refusal) as raised:
        read(values)
    assert raised.value.reason == "METHOD_INVALID"
    return tuple(raised.value.messages)


def test_text_and_values_mean_the_same() -> None:
    typed: dict[str, Any] = {
        "r": 16,
        "rate": 0.5,
        "bias": True,
        "kind": "bb",
        "names": ["q", "v"],
        "layers": [0, 2, 4, 5, 6],
        "ranks": {"q": 4, "k": 8},
        "alphas": {"q": 4.5, "k": 8},
    }
    text = {
        "r": "16",
        "rate": "5e-1",
        "bias": "Yes",
        "kind": "bb",
        "names": "q, v",
        "layers": "4-6,0,2",
        "ranks": "q=4, k=8",
        "alphas": "q=4.5, k=8",
    }
    for values in (typed, text, {**typed, "r": 16.0}):
        options = read(values)
        assert options.r == 16
        assert type(options.r) is int
        assert options.rate == 0.5
        assert options.bias is True
        assert options.kind == "bb"
        assert options.names == ("q", "v")
        assert options.layers == (0, 2, 4, 5, 6)
        assert options.ranks == {"q": 4, "k": 8}
        assert options.alphas == {"q": 4.5, "k": 8.0}


def test_what_is_not_given_is_the_default() -> None:
    options = read({"r": 3})
    assert options.model_fields_set == {"r"}
    assert options.rate == 0.25
    assert options.names == ("q",)
    assert options.ranks == {}


@pytest.mark.parametrize("value", [True, 1.5, "1.5", "one", [1], float("nan"), "inf", "1" * 400])
def test_no_whole_numbers(value: object) -> None:
    (problem,) = refused({"r": value})
    assert problem.startswith("method: r is ")
    assert fields.read(Sample, {"r": value})[0] == Sample.model_validate({})


@pytest.mark.parametrize("value", [True, "x", [1], float("nan"), float("inf"), "nan", 1, "-0.5"])
def test_no_numbers_in_the_range(value: object) -> None:
    (problem,) = refused({"rate": value})
    assert problem.startswith("method: rate is ")


@pytest.mark.parametrize(
    "value", ["a=", "=3", "a=0", "a=-1", "a=x", "a=1,a=2", "a", 3, {1: 2}, {1: 2, "q": 0}]
)
@pytest.mark.parametrize("name", ["ranks", "alphas"])
def test_no_mappings(name: str, value: object) -> None:
    assert any(name in problem or "twice" in problem for problem in refused({name: value}))


def test_a_text_may_hold_no_numbers() -> None:
    assert read({"ranks": ""}).ranks == {}


@pytest.mark.parametrize(
    "value", ["1-", "3-1", "-1", "a", "", [], [1.5], 2.5, True, [True], "0-99999999"]
)
def test_no_lists_of_layers(value: object) -> None:
    (problem,) = refused({"layers": value})
    assert problem.endswith('it should be whole numbers, as in "0,2,4-7"')


@pytest.mark.parametrize("value", ["", ",", [], [3], 3, None])
def test_no_lists_of_names(value: object) -> None:
    (problem,) = refused({"names": value})
    assert problem.startswith("method: names is ")


def test_all_problems_and_unknown_names() -> None:
    values = {"r": 0, "rate": 2, "bias": "perhaps", "rank": 1, "kind": "c", "alphas": {"q": 0}}
    options, found = fields.read(Sample, values, "method")
    problems = OptionProblems("lora", found)
    problems.add("r", "r: does not fit")
    assert problems.at_most("layers", 9, 8) == 8
    with pytest.raises(Refusal) as raised:
        problems.check()
    assert options == Sample.model_validate({})
    assert [problem.field for problem in found] == [
        f"method.{name}" for name in ("r", "rate", "bias", "kind", "alphas", "rank")
    ]
    assert list(raised.value.messages) == [
        "lora: r is 0; it should be at least 1",
        "lora: rate is 2; it should be below 1",
        "lora: bias is 'perhaps'; it should be true or false",
        "lora: kind is 'c'; it should be aa or bb",
        "lora: alphas.q is 0; it should be above 0",
        "lora: there is no 'rank' (did you mean 'ranks'?)",
        "lora: r: does not fit",
        "lora: layers is 9; it should be at most 8",
    ]
