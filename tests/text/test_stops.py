"""Stop strings, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st
from loraplex_server.text.stops import StopMatcher

few = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The same by looking at the whole text: up to the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [end - len(s) for s in stops if text[:end].endswith(s)]
        if found:
            return text[: min(found)], True
    return text, False


def cut(text: str, cuts: list[int]) -> list[str]:
    at = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(at)] or [""]


def fed(text: str, stops: list[str], cuts: list[int]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    passed = []
    for piece in cut(text, cuts):
        out, stopped = matcher.push(piece)
        passed.append(out)
        if stopped:
            return passed, True
    return [*passed, matcher.finish()], False


@given(few, stops, st.lists(st.integers(0, 30), max_size=10))
@example("abcab", ["abcabd", "ca"], [1, 2, 3, 4])
@example("aab", ["ab"], [1, 2])
def test_what_is_passed_on_is_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    passed, stopped = fed(text, stops, cuts)
    assert ("".join(passed), stopped) == naive(text, stops)


@given(few, st.text("abc", min_size=1, max_size=5), st.lists(st.integers(0, 30), max_size=10))
def test_one_stop_string_is_found_as_find_finds_it(text: str, stop: str, cuts: list[int]) -> None:
    passed, stopped = fed(text, [stop], cuts)
    at = text.find(stop)
    assert stopped == (at >= 0)
    assert "".join(passed) == (text[:at] if at >= 0 else text)


@given(few, stops, st.lists(st.integers(0, 30), max_size=10))
def test_no_part_of_a_stop_string_is_ever_passed_on_early(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    sent = ""
    for piece in cut(text, cuts):
        out, stopped = matcher.push(piece)
        sent += out
        # Whatever may follow, the answer still begins with what was sent.
        for future in ("", *stops):
            assert naive(text + future, stops)[0].startswith(sent)
        if stopped:
            return


def test_text_that_begins_no_stop_string_is_not_delayed() -> None:
    matcher = StopMatcher(["###", "END"])
    assert matcher.push("hello E") == ("hello ", False)
    assert matcher.push("xtra #") == ("Extra ", False)
    assert matcher.push("1") == ("#1", False)
    assert matcher.push("") == ("", False)
    assert matcher.finish() == ""


def test_without_stop_strings_all_text_passes() -> None:
    assert StopMatcher([]).push("anything") == ("anything", False)
