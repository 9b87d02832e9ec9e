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
