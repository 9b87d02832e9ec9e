"""A name that is refused comes with one that is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_adapters.store.index.ids import check_name, parse_id, suggested_id, suggested_name
from loraplex_adapters.store.index.labels import check_keys, suggested_key
from loraplex_model.base.refusal import Refusal

SUGGESTIONS = {
    "Org/Name_v1.2": "org-name-v1-2",
    "Support_v1.2": "support-v1-2",
    "acme/support": "acme-support",
    "orders_v2": "orders-v2",
    "  Café  Crème ": "cafe-creme",
    "-a-": "a",
    "x" * 80: "x" * 63,
    "a" * 62 + "_b": "a" * 62,
    "日本": "",
    "": "",
}


@pytest.mark.parametrize(("text", "wanted"), SUGGESTIONS.items(), ids=map(ascii, SUGGESTIONS))
def test_a_refused_name_comes_with_one_like_it(text: str, wanted: str) -> None:
    assert suggested_name(text) == wanted
    with pytest.raises(Refusal) as refused:
        check_name(text)
    hint = f'did you mean "{wanted}"?'
    assert (hint in refused.value.message) == bool(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Support_v1.2@3", "support-v1-2@3"),
        ("support@v3", "support@3"),
        ("support@latest", "support"),
        ("a--b@latest", "a--b"),
        ("Org/Support@sha256:" + "0" * 64, "org-support@sha256:" + "0" * 64),
        ("support@" + "0" * 64, "support@sha256:" + "0" * 64),
    ],
)
def test_a_refused_id_comes_with_one_like_it(text: str, wanted: str) -> None:
    assert suggested_id(text) == wanted
    with pytest.raises(Refusal) as refused:
        parse_id(text)
    assert f'did you mean "{wanted}"?' in refused.value.message


@settings(max_examples=500)
@given(text=st.text(st.characters(codec=None), max_size=300))
def test_every_suggestion_is_itself_accepted(text: str) -> None:
    if name := suggested_name(text):
        assert check_name(name) == name
        assert suggested_name(name) == name or "--" in name
    if adapter_id := suggested_id(text):
        parse_id(adapter_id)
    if key := suggested_key(text):
        check_keys([key])
