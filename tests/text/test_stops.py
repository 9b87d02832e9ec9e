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


@given(st.lists(st.tuples(few, st.booleans()), max_size=8), stops)
@example([("ab", True), ("<c>", False), ("d", True)], ["b<c>"])
@example([("a", True), ("b", False), ("c", True)], ["bc"])
def test_stops_are_found_in_text_that_is_not_shown(
    parts: list[tuple[str, bool]], stops: list[str]
) -> None:
    """Special tokens are searched but not shown."""
    matcher = StopMatcher(stops)
    given, stopped = "", False
    for text, is_shown in parts:
        out, stopped = matcher.push(text, text if is_shown else "")
        given += out
        if stopped:
            break
    if not stopped:
        given += matcher.finish()
    whole = "".join(text for text, _ in parts)
    end, found = naive(whole, stops)
    assert stopped == found
    left, expected = len(end), ""
    for text, is_shown in parts:
        expected += text[: max(left, 0)] if is_shown else ""
        left -= len(text)
    assert given == expected
    if found:
        assert matcher.matched in stops
        assert whole.startswith(end + (matcher.matched or ""))
    else:
        assert matcher.matched is None


def test_a_text_that_is_shown_differently_is_cut_where_it_is_the_same() -> None:
    for searched, shown, stop, left in (
        (" the end", "the end", "end", "the "),
        (" the", "the", " ", ""),
        ("\ufffd!", "é!", "!", "é"),
        ("\ufffd!", "é!", "\ufffd", ""),
        ("x", "", "x", ""),
    ):
        assert StopMatcher([stop]).push(searched, shown) == (left, True)
    matcher = StopMatcher(["ab"])
    assert matcher.push("", "é") == ("é", False)
    assert matcher.push("a", "a") == ("", False)
    assert matcher.push("", "é") == ("", False)
    assert matcher.push("c", "c") == ("aéc", False)


def test_of_two_that_end_together_the_longer_is_matched() -> None:
    matcher = StopMatcher(["c", "bc", "x"])
    assert matcher.push("abc") == ("a", True)
    assert matcher.matched == "bc"


def test_text_that_begins_no_stop_string_is_not_delayed() -> None:
    matcher = StopMatcher(["###", "END"])
    assert matcher.push("hello E") == ("hello ", False)
    assert matcher.push("xtra #") == ("Extra ", False)
    assert matcher.push("1") == ("#1", False)
    assert matcher.push("") == ("", False)
    assert matcher.finish() == ""


def test_without_stop_strings_all_text_passes() -> None:
    assert StopMatcher([]).push("anything") == ("anything", False)


@given(st.lists(st.tuples(few, st.booleans()), max_size=8), stops, st.booleans())
@example([("ab", False), ("c", True)], ["ab", "bc"], True)
@example([("aba", False), ("b", True)], ["ab"], False)
@example([("ab", False), ("x", True)], ["abc", "b"], True)
def test_stops_that_are_complete_too_early_are_passed_over(
    parts: list[tuple[str, bool]], stops: list[str], include: bool
) -> None:
    """What counts is the piece that completes a stop string, wherever the string begins."""
    whole, ends = "", []
    for text, may_end in parts:
        ends += range(len(whole) + 1, len(whole) + len(text) + 1) if may_end else ()
        whole += text
    expected, found = whole, False
    for end in ends:
        begins = [end - len(s) for s in stops if whole[:end].endswith(s)]
        if begins:
            expected, found = whole[: end if include else min(begins)], True
            break
    matcher = StopMatcher(stops, include)
    given, stopped = "", False
    for text, may_end in parts:
        out, stopped = matcher.push(text, may_end=may_end)
        given += out
        if stopped:
            break
    given += "" if stopped else matcher.finish()
    assert (given, stopped) == (expected, found)


def test_a_stop_string_that_is_included_is_whole_even_if_it_was_not_shown() -> None:
    matcher = StopMatcher(["i<s>l"], include=True)
    assert matcher.push("hi", "hi") == ("h", False)
    assert matcher.push("<s>", "") == ("", False)
    assert matcher.push("lo", "lo") == ("i<s>l", True)
    assert matcher.matched == "i<s>l"
