"""Weights of accounts are read from text and from tables, and nonsense is refused by name."""

from __future__ import annotations

import pytest
from loraplex_server.config_sources import ConfigError, load
from loraplex_server.fair_weights import account_of, parse


def test_names_mixes_and_the_base_have_one_account_each() -> None:
    assert account_of([]) == "_base"
    assert account_of(["pirate"]) == "pirate"
    assert account_of(["b", "a", "b"]) == account_of(["a", "b"]) == "a+b"


def test_weights_are_read_from_text_and_from_a_table() -> None:
    expected = {"pirate": 3.0, "_base": 0.5, "a+b": 2.0}
    assert parse("pirate=3,_base=0.5,b+a=2") == expected
    table = {"pirate": 3, "_base": 0.5, "b+a": 2}
    config = load(None, {"fair_weights": table})
    assert config.engine_limits().fair_weights == expected
    assert parse("") == {}


@pytest.mark.parametrize(
    "text",
    ["pirate", "pirate=", "=3", "pirate=0", "pirate=-1", "pirate=nan", "pirate=inf", "pirate=1e9",
     "pirate=three", "pirate=1,pirate=2", "a+b=1,b+a=1"],
)  # fmt: skip
def test_weights_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="fair_weights"):
        load(None, {"fair_weights": text})


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_priority", 11), ("max_priority", -11), ("prompt_step_ratio", -1), ("adapter_turn", -1),
     ("max_queue_seconds", "nan")],
)  # fmt: skip
def test_bounds_of_the_settings_of_order(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        load(None, {name: value})
