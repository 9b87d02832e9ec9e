"""Patterns: for plain keys our matching equals PEFT's, without its running times."""

from __future__ import annotations

import re

import pytest
from adapters.adapter_files import llama_path
from hypothesis import given
from hypothesis import strategies as st
from loraplex_adapters.format.patterns import MAX_FOREIGN_KEYS, is_plain, match
from loraplex_model.base.config import PROJECTIONS

PATHS = [llama_path(layer, name) for layer in (0, 1, 12) for name in PROJECTIONS]
WORDS = ["model", "layers", "self_attn", "self", "attn", "mlp", *PROJECTIONS, "q", "proj", "s_lf"]
PLAIN = st.lists(st.sampled_from([*WORDS, "0", "1", "12", "2"]), min_size=1, max_size=6).map(
    ".".join
)


def by_peft(pattern: dict[str, int], path: str) -> set[int]:
    """The values of all keys that PEFT's rule matches, of which it uses the first."""
    return {v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", path)}


@given(st.dictionaries(PLAIN, st.integers(1, 3), max_size=6))
def test_plain_keys_match_as_in_peft(pattern: dict[str, int]) -> None:
    matched = match(pattern, PATHS)
    expected = {path: by_peft(pattern, path) for path in PATHS}
    assert {p for p in PATHS if expected[p]} == matched.values.keys()
    if any(len(values) > 1 for values in expected.values()):
        assert matched.conflict is not None
        path, first, second = matched.conflict
        assert {pattern[first], pattern[second]} <= expected[path]
        assert pattern[first] != pattern[second]
    else:
        assert matched.conflict is None
        assert all(expected[path] == {value} for path, value in matched.values.items())


@given(st.text("ab_.019*+?()[]{}|^$\\\n é", max_size=12))
def test_a_plain_name_is_no_expression(name: str) -> None:
    if is_plain(name):
        assert re.escape(name).replace("\\.", ".") == name
    else:
        assert not name or re.search(r"[^A-Za-z0-9_.]|^\.|\.$|\.\.", name)


def test_more_foreign_keys_than_can_be_compared_quickly_are_refused() -> None:
    foreign = {f"vision.layers.{n}.q_proj": 1 for n in range(MAX_FOREIGN_KEYS)}
    assert match(foreign, PATHS).values == {}
    with pytest.raises(ValueError, match="keys"):
        match({**foreign, "one.more": 1}, PATHS)
