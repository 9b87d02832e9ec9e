"""Expressions of a file match what Python's `re` matches, in bounded time and without running."""

from __future__ import annotations

import re
import time

import pytest
from adapters.adapter_files import llama_path
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loraplex_adapters.format.expressions.automaton import Expression, Work, ending, find, whole
from loraplex_adapters.format.expressions.grammar import NotEvaluated
from loraplex_adapters.format.expressions.names import Names
from loraplex_adapters.format.patterns import MAX_EXPRESSIONS, match
from loraplex_model.base.config import LAYER_SITES, MODEL_SITES

SECONDS = 2.0
"""Far above what an evaluation takes, which is 10 ms; a backtracking one takes years."""


def names_of(layers: int) -> list[str]:
    """Paths of all modules of a base."""
    above = [llama_path(-1, name) for name in MODEL_SITES]
    return above + [llama_path(layer, name) for layer in range(layers) for name in LAYER_SITES]


PATHS = names_of(12)
DEEP = names_of(100)

LANGUAGE = "(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
PROJECTIONS = "(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TRAINERS = [
    rf"{LANGUAGE}{PROJECTIONS}.*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|mlp)\.(?:{PROJECTIONS}))",
    r"model.layers.[\d]+.(mlp|self_attn).(up|down)_proj",
    r"^(language_model|model)(?!.*(lm_head|output|emb)).*",
    r"^(?!.*(?:visual|vision)).*(?:q_proj|v_proj|gate_proj).*",
    r"(?:(?!mlp).)*_proj",
    r".*\.layers\.3\..*(q_proj|v_proj)$",
    r"model\.layers\.(?:0|1|2)\.self_attn\.[qkv]_proj",
    r".*\.(1[0-9]|[4-7])\.[a-z_]+\.[^.]*",
    r"model\.layers\.\d+\.mlp\.(?P<part>gate|up)_proj",
    r".*_(?=pro).*",
    r"(?!model\.layers\.1\b).*",
    r".*",
]

WORDS = ["model", "layers", "mlp", "proj", "q_", "_", "1", "0", "up", "lm", "head", "{", "-"]
SIGNS = [r"\.", ".", r"\d", r"\w", r"\W", r"[\d]", "[0-3]", "[^.]", "[a-z_]", "[.]"]
PLACES = [r"\b", r"\B", "^", "$"]
PIECES = st.sampled_from([*WORDS, *SIGNS, *PLACES])


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions made of smaller ones."""
    bounds = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{0,3}?"])
    return (
        st.lists(inner, min_size=1, max_size=4).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})")
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | st.tuples(inner, bounds).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
        | inner.filter(lambda text: "(?=" not in text and "(?!" not in text).flatmap(
            lambda text: st.sampled_from([f"(?={text})", f"(?!{text})"])
        )
    )


EXPRESSIONS = st.recursive(PIECES, grown, max_leaves=10)


def found_by_python(expression: str, paths: list[str], *, whole_name: bool) -> set[str]:
    """What PEFT finds."""
    if whole_name:
        return {path for path in paths if re.fullmatch(expression, path)}
    return {path for path in paths if re.match(rf"(.*\.)?({expression})$", path)}


SHORT = ["lm_head", "model.norm", "mlp", "0.1.mlp.q_", "layers.10", "model.0.up", "proj_", "_.1"]
"""Names that are short, since the time of `re` grows exponentially with their length."""


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS)
@example("(?:a|b*)*")
@example(r"(?:\b)*mlp")
def test_expressions_match_as_in_python(expression: str) -> None:
    names = Names.of(SHORT)
    found = find(whole(expression), names, Work()), find(ending(expression), names, Work())
    assert found[0] == found_by_python(expression, SHORT, whole_name=True)
    assert found[1] == found_by_python(expression, SHORT, whole_name=False)


@pytest.mark.parametrize("expression", TRAINERS, ids=range(len(TRAINERS)))
@pytest.mark.parametrize("paths", [PATHS, DEEP], ids=["12", "100"])
def test_what_trainers_write_is_evaluated_on_shallow_and_deep_bases(
    expression: str, paths: list[str]
) -> None:
    expected = found_by_python(expression, paths, whole_name=True)
    assert Expression(expression).matches(paths) == expected
    assert match({expression: 1}, paths).values.keys() == found_by_python(
        expression, paths, whole_name=False
    )


REFUSED = {
    r"(?<=mlp\.)up_proj": "uses look-behind, which is not evaluated, at character 1",
    r"(q)_\1": "uses a reference to a group, which is not evaluated, at character 5",
    r"(?P<x>q)(?P=x)": "a reference to a group",
    r"(?i)Q_PROJ": "uses flags",
    r"(?i:Q)_proj": "uses flags",
    r"(?>q|v)_proj": "an atomic group",
    r"q_proj++": "a possessive repeat",
    r"(q)?(?(1)_proj|x)": "a condition",
    r"(?#all)q_proj": "a comment",
    r"(?!.*(?=x)).*": "look-ahead within look-ahead",
    r"\N{DIGIT ONE}": "uses \\N",
    r"*q_proj": "has a * that repeats nothing at character 1",
    r"q**": "repeats a repeat",
    r"(q_proj": "has a ( without a ) at character 1",
    r"q_proj)": "has a ) without a ( at character 7",
    r"[q_proj": "has a [ without a ]",
    r"[z-a]": "has a range",
    r"q{3,1}": "in the wrong order",
    "q\\": "ends in a backslash",
}


@pytest.mark.parametrize(("expression", "why"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_not_evaluated_is_refused_by_name_and_place(expression: str, why: str) -> None:
    with pytest.raises(NotEvaluated) as refused:
        Expression(expression)
    assert why in str(refused.value)


HOSTILE = [
    "(a+)+$",
    "(.*)*x",
    "(a|a)*",
    "((a{1,100}){1,100})",
    "(.*a){30}",
    "(.*a){3000}",
    "(a?){90}a{90}",
    "(.?){4000}",
    "((?!.*x).)*",
    "((?!(.*)*x).)*",
    "((?=.*x)|.)*",
    "(?=a{1000}){1000}",
    "(?:(?:.*){60}(?:.*){60})*x",
    "(.|.|.|.)*" * 100 + "x",
    ".*" * 2000,
    "()" * 2000,
    "(){999999}",
    "a{999999999999999999999}",
    "(" * 5000,
    "(" * 30 + ".*" + ")*" * 30,
    "[a-z]" * 800,
    "x" * 65_536,
    "(?:a|" * 8000,
    "[" * 60_000,
]


@pytest.mark.parametrize("expression", HOSTILE, ids=range(len(HOSTILE)))
def test_no_expression_takes_long(expression: str) -> None:
    began = time.process_time()
    work = Work()
    try:
        found = find(ending(expression), Names.of(DEEP), work)
    except NotEvaluated:
        found = frozenset()
    assert found <= set(DEEP)
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize(
    "key", ["(x|.*)*{}", "(.|.)*{}", ".*" * 20 + "{}", "(?!.*{}).*"], ids=range(4)
)
def test_many_expressions_share_one_bound(key: str) -> None:
    began = time.process_time()
    for count in (MAX_EXPRESSIONS, 10_000):
        with pytest.raises(ValueError, match=r"steps|expressions|states"):
            match({key.format(n): 1 for n in range(count)}, DEEP)
    assert time.process_time() - began < SECONDS


def test_expressions_that_disagree_are_a_conflict_and_order_decides_nothing() -> None:
    pattern = {r".*\.1\..*": 1, "q_proj": 2}
    matched = match(pattern, PATHS)
    assert matched.conflict is not None
    path, *keys = matched.conflict
    assert path == "model.layers.1.self_attn.q_proj"
    assert set(keys) == set(pattern)
    assert match({r".*\.1\..*": 1, "q_proj": 1}, PATHS).conflict is None


@pytest.mark.parametrize("form", ["^{}$", "^{}", "{}$", "{}"])
@pytest.mark.parametrize("dot", ["\\.", "."])
def test_a_key_for_each_module_is_looked_up(form: str, dot: str) -> None:
    layers = [f"model.layers.{n}" for n in range(80)]
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    paths = [f"{layer}.{module}" for layer in layers for module in modules]
    pattern = {
        form.format(path.replace(".", dot)): 1 + at for at, path in enumerate(paths) if at % 3
    }
    pattern |= {"^q_proj": 900, f"^self_attn{dot}q_proj": 901, f"layers{dot}7{dot}x": 902}
    matched = match(pattern, paths)
    # What PEFT does: the first key that matches.
    assert matched.conflict is None
    for path in paths[:30]:
        keys = [key for key in pattern if re.match(rf"(.*\.)?({key})$", path)]
        assert matched.values.get(path) == (pattern[keys[0]] if keys else None)
