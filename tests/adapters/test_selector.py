"""Label selectors mean the same as text, in Python and in the database, whatever they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_adapters.store import LabelSelector
from loraplex_adapters.store.index import schema
from loraplex_adapters.store.index.database import Database
from loraplex_adapters.store.index.selector import MAX_SELECTOR
from loraplex_model.base.refusal import Reason, Refusal

KEYS = ["team", "stage", "a", "in", "notin", "x.y/z_0-"]
VALUES = ["", "a", "b", "live", "Live", "é日本", "in", "c d", "x=y", "!z", "%", "_", "'", '"']
PLAIN = [value for value in VALUES if not set(value) & set(" =!")]
FORMS = ["=", "==", "!=", "in", "notin", "exists", "absent"]

Condition = tuple[str, str, tuple[str, ...]]
"""Key, form and values of one condition."""


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    form = draw(st.sampled_from(FORMS))
    if form in ("in", "notin"):
        values = draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=4))
    else:
        values = [draw(st.sampled_from(PLAIN))]
    return draw(st.sampled_from(KEYS)), form, tuple(values)


labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES))
gap = st.sampled_from(["", " ", "  ", "\t"])


@st.composite
def written(draw: st.DrawFn) -> tuple[str, list[Condition]]:
    """A selector's text, with any white space that is allowed, and its conditions."""
    listed = draw(st.lists(conditions(), max_size=4))
    texts = []
    for key, form, values in listed:
        space = draw(gap)
        if form == "exists":
            text = key
        elif form == "absent":
            text = f"!{space}{key}"
        elif form in ("in", "notin"):
            text = f"{key} {space}{form}{space}({','.join(space + v + space for v in values)})"
        else:
            text = f"{key}{space}{form}{space}{values[0]}"
        texts.append(draw(gap) + text + draw(gap))
    return ",".join(texts), listed


def holds(condition: Condition, given_labels: Mapping[str, str]) -> bool:
    """What Kubernetes says that a condition means."""
    key, form, values = condition
    if form == "exists":
        return key in given_labels
    if form == "absent":
        return key not in given_labels
    equal = any(key in given_labels and given_labels[key] == value for value in values)
    return equal if form in ("=", "==", "in") else not equal


def read(text: str) -> LabelSelector | None:
    """The selector; None if it is refused with the typed error."""
    try:
        return LabelSelector.parse(text)
    except Refusal as refusal:
        if refusal.reason is not Reason.FIELD_INVALID:
            raise
        return None


@settings(deadline=None)
@given(written(), labels)
def test_a_selector_means_what_its_conditions_mean(
    text_and_conditions: tuple[str, list[Condition]], carried: dict[str, str]
) -> None:
    text, listed = text_and_conditions
    expected = all(holds(condition, carried) for condition in listed)
    assert LabelSelector.parse(text).matches(carried) == expected


@settings(deadline=None)
@given(written())
def test_a_selector_as_text_is_the_same_selector(
    text_and_conditions: tuple[str, list[Condition]],
) -> None:
    selector = LabelSelector.parse(text_and_conditions[0])
    assert LabelSelector.parse(str(selector)) == selector


@settings(deadline=None)
@given(st.text() | st.text(alphabet="ab=!,() innot\t\n", max_size=60))
def test_no_text_raises_anything_but_the_typed_error(text: str) -> None:
    selector = read(text)
    assert selector is None or LabelSelector.parse(str(selector)) == selector


@pytest.mark.parametrize(
    "piece",
    ["a,", "a", " ", ",", "(", "a in (", "a in (b", "a " * 2, "!", "! ", "=", "a=", "a  ", "a in"],
)
def test_a_text_of_the_largest_size_is_read_or_refused_at_once(piece: str) -> None:
    """A pattern that backtracks would take hours here, and the test would end by its timeout."""
    for extra in ("", "(", "=", ","):
        text = (piece * MAX_SELECTOR)[: MAX_SELECTOR - len(extra)] + extra
        read(text)
    with pytest.raises(Refusal):
        LabelSelector.parse(piece * MAX_SELECTOR + "x")


@pytest.mark.parametrize(
    "text",
    ["a=b,", ",a", "a,,b", "a b", "a in b", "a in (b", "a in b)", "A=b", "a=b c", "=b", "!", "!a=b",
     "a in (b))", "a=(b)", "-a", "a=\x00", "a in (\x1b)", "a" * 64, "a=" + "b" * 257,
     ",".join(f"k{i}" for i in range(33))],
)  # fmt: skip
def test_what_is_no_selector_is_refused(text: str) -> None:
    with pytest.raises(Refusal) as refused:
        LabelSelector.parse(text)
    assert refused.value.reason is Reason.FIELD_INVALID


def test_the_labels_that_a_selector_fixes_are_those_of_equality() -> None:
    selector = LabelSelector.parse("team=a, stage in (x), kind in (b,c), !old, z!=1, y")
    assert selector.fixed == {"team": "a", "stage": "x"}
    assert selector.keys == {"team", "stage", "kind", "old", "z", "y"}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """The index of a store with many versions, whose labels are all combinations of a few."""
    opened = Database(tmp_path_factory.mktemp("index") / "index.db", "")
    with opened.writing() as connection:
        schema.prepare(connection, None, has_blobs=False)
        connection.execute(schema.blobs.insert(), {"digest": "d", "summary": {}, "created_at": 0})
        for index in range(200):
            name = f"n{index}"
            connection.execute(
                schema.names.insert(), {"name": name, "current_version": 1, "last_version": 1}
            )
            connection.execute(
                schema.versions.insert(),
                {"name": name, "version": 1, "digest": "d", "created_at": 0.0},
            )
            for key, value in carried_by(index).items():
                connection.execute(
                    schema.labels.insert(),
                    {"name": name, "version": 1, "key": key, "value": value},
                )
    yield opened
    opened.close()


def carried_by(index: int) -> dict[str, str]:
    """The labels of a version: digits of its number choose among no label and the values."""
    chosen = {}
    for key in KEYS[:3]:
        index, digit = divmod(index * 7 + 3, len(VALUES) + 1)
        if digit:
            chosen[key] = VALUES[digit - 1]
    return chosen


@settings(deadline=None)
@given(written())
def test_the_database_selects_what_python_selects(
    database: Database, text_and_conditions: tuple[str, list[Condition]]
) -> None:
    selector = LabelSelector.parse(text_and_conditions[0])
    query = sa.select(schema.versions.c.name).where(*selector.conditions())
    with database.reading() as connection:
        found = set(connection.execute(query).scalars())
    assert found == {f"n{i}" for i in range(200) if selector.matches(carried_by(i))}


def test_the_labels_of_the_database_test_differ() -> None:
    seen = [carried_by(i) for i in range(200)]
    assert {len(each) for each in seen} >= {2, 3}
    assert all(any(each.get(key) == value for each in seen) for key in KEYS[:1] for value in VALUES)
