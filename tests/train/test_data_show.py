"""What is shown is what is learned, and a data set cannot command a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

from loraplex_training import data
from loraplex_training.data.show import CUT, LEARNED, SPECIAL, example, mask, show
from loraplex_training.data.text import BaseText
from loraplex_training.spec.spec import DataSpec
from rich.console import Console, RenderableType

from train.chat_bases import chat_base


def printed(shown: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def load(tmp_path: Path, completion: str, **spec: int) -> tuple[data.Dataset, BaseText]:
    base = chat_base(tmp_path / "base")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "[red]what[/red] [/b]", "completion": completion}))
    return data.load(DataSpec(path, eval_fraction=0, **spec), base.text), base.text


def test_exactly_the_learned_tokens_are_in_the_colour_of_what_is_learned(tmp_path: Path) -> None:
    loaded, text = load(tmp_path, "the 日本 end")
    shown = mask(loaded.train[0], text)
    coloured = "".join(
        shown.plain[span.start : span.end] for span in shown.spans if LEARNED in str(span.style)
    )
    assert coloured.replace("·", "") == "the 日本 end<|im_end|>"
    special = {shown.plain[s.start : s.end] for s in shown.spans if SPECIAL in str(s.style).split()}
    assert special == {"<|im_start|>", "<|im_end|>"}
    assert "[red]what[/red] [/b]" in shown.plain  # words of the data are not markup


def test_control_characters_are_spelt_out(tmp_path: Path) -> None:
    loaded, text = load(tmp_path, "a\x1b[31mb\x07\u202ec")
    shown = printed(example(loaded.train[0], text))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "a\\x1b[31mb\\x07\\u202ec" in shown.replace("·", "")


def test_a_cut_is_marked_and_the_report_says_so(tmp_path: Path) -> None:
    whole, text = load(tmp_path, "the quick brown fox")
    loaded, text = load(tmp_path, "the quick brown fox", max_length=len(whole.train[0].tokens) - 2)
    shown = mask(loaded.train[0], text)
    assert shown.plain.endswith(" … 2 tokens cut ")
    assert str(shown.spans[-1].style) == CUT
    page = printed(show(loaded, text))
    assert "1 of 1 training examples were cut" in page
    assert f"{len(loaded.train[0].tokens)} tokens, {sum(loaded.train[0].learned)} learned" in page
    assert "2 tokens cut" in page


def test_the_report_says_what_was_read_as_what(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base")
    talk = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the end"}]
    lines: list[dict[str, object]] = [
        {"messages": talk},
        {"messages": talk},
        {"messages": talk[:1]},
        {"messages": [*talk, talk[0]]},
        {"prompt": "the", "completion": ""},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    other = tmp_path / "b.json"
    other.write_text(json.dumps([lines[0], {"instruction": "what", "output": "fox", "id": 1}]))
    loaded = data.load(DataSpec((path, other), eval_fraction=0), base.text)
    assert loaded.report.causes == {
        'ends with a message of the role "user"; it must end with an answer (assistant)': (
            f"{path}:5",
            f"{path}:7",
        ),
        'has nothing under "completion"': (f"{path}:9",),
    }
    one, two = loaded.report.files
    assert (one.shapes, one.dropped, one.repeated, one.blank) == ({"messages": 2}, 3, 1, 4)
    assert (two.shapes, two.dropped, two.repeated) == ({"messages": 1, "instruction": 1}, 0, 0)
    assert one.learned + two.learned == loaded.report.train.learned
    assert one.tokens + two.tokens == loaded.report.train.tokens
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(show(loaded, base.text))
    assert isinstance(console.file, io.StringIO)
    page = console.file.getvalue()
    counts = loaded.report.train
    for words in (
        f"{counts.learned:,} ({counts.learned / counts.tokens:.1%})",
        "lines: 1 instruction, 3 messages; dropped: 3",
        f"{path}: JSONL, 2 examples, 50.0% of an epoch, {one.tokens} tokens, {one.learned} (",
        "learned, lines: 2 messages, 3 dropped, 1 repeated, 4 blank",
        'has nothing under "completion"',
        f"{path}:9",
        "2 training lines repeat earlier ones",
        "4 blank lines were skipped",
        'keys that were ignored: "id" (1)',
    ):
        assert words in page
    assert "3 lines were dropped" not in page  # the table says it
    assert any("2 lines were dropped" in note for note in loaded.report.notes())


def test_ignored_keys_cannot_command_a_terminal(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the", "_\x1b[31m": 1}))
    page = printed(show(data.load(DataSpec(path, eval_fraction=0), base.text), base.text))
    assert "\x1b" not in page
    assert '"_\\x1b[31m" (1)' in page
