"""The model card: true, readable, and not to be broken by what the data holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from loraplex_training.report.card import MOST_ROWS, Facts, card
from loraplex_training.report.events import Evaluated, Event, JobEnded, JobStatus, Sampled
from loraplex_training.spec.spec import DataSpec, JobSpec, MethodSpec

from train.commands import is_known

JOB = JobSpec("tickets", DataSpec(Path("/srv/someone/secret/tickets.jsonl")),
              MethodSpec("lora", {"r": 16, "target_modules": "q_proj|v_proj"}))  # fmt: skip
FACTS = Facts("org/base-1", "sha256:ff", 12345, {"training examples": 1200}, "d" * 64, "e" * 64, 20)
EVENTS: tuple[Event, ...] = (
    Evaluated("tickets", 0, 3.0, 20.1, 0.0, False),
    Sampled("tickets", 0, "Where?", "I do not know", "Here"),
    Evaluated("other", 10, 9.9, 9.9, 0.9, True),
    Evaluated("tickets", 10, 2.0, 7.4, 0.25, True),
    Evaluated("tickets", 20, 1.0, 2.7, 0.75, True),
    Evaluated("tickets", 30, 1.5, 4.5, 0.5, False),
    Sampled("tickets", 30, "Where?", "Here", "Here"),
    JobEnded("tickets", JobStatus.FINISHED, 30, "all 30 steps are done"),
)


def test_it_tells_how_good_the_adapter_is_and_how_it_was_made() -> None:
    text = card(JOB, FACTS, EVENTS)
    assert "| 0 | 3.0000 | 20.1 | 0.0% |" in text
    assert "| **20** | 1.0000 | 2.7 | 75.0% |" in text
    assert "9.9" not in text  # another job's
    assert "12,345" in text
    assert "1,200" in text
    assert "loraplex adapters upload tickets . --load" in text
    assert text.index("I do not know") < text.index("after 30 steps")
    assert text == card(JOB, FACTS, EVENTS)


@pytest.mark.parametrize("template", ["", "f" * 64])
def test_its_commands_are_the_clients(template: str) -> None:
    text = card(JOB, replace(FACTS, template=template), EVENTS)
    commands = text.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 2
    for command in commands:
        assert is_known(command), command


def test_its_head_is_what_hubs_read() -> None:
    _, head, _ = card(JOB, FACTS, EVENTS).split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "org/base-1",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["loraplex", "lora"],
    }
    local = card(JOB, replace(FACTS, base="base"), EVENTS)
    assert "base_model:" not in local


def test_no_path_of_the_machine_is_in_it() -> None:
    assert "someone" not in card(JOB, FACTS, EVENTS)


@pytest.mark.parametrize("words", ["```\n# no heading", "`````", "a | b", "<b>", "$x$"])
def test_what_data_holds_stays_in_its_block(words: str) -> None:
    text = card(JOB, FACTS, [Sampled("tickets", 0, words, words, words)])
    fence = "`" * (6 if "`````" in words else 4 if "```" in words else 3)
    assert text.count(f"\n{fence}text\n{words}\n{fence}\n") == 3


def test_a_table_s_cell_holds_no_bar() -> None:
    rows = [line for line in card(JOB, FACTS, EVENTS).splitlines() if "q_proj" in line]
    assert rows == ["| method | lora: r `16`, target_modules `q_proj\\|v_proj` |"]


def test_many_evaluations_are_thinned_but_not_the_first_the_best_and_the_last() -> None:
    many = [Evaluated("tickets", n, 3.0 - n / 1000, 2.0, None, False) for n in range(200)]
    text = card(JOB, replace(FACTS, step=101), many)
    rows = [line for line in text.splitlines() if line.startswith(("| 0", "| 1", "| **"))]
    for step in ("| 0 |", "| **101** |", "| 199 |"):
        assert any(row.startswith(step) for row in rows)
    assert text.count(" 2 |\n") <= MOST_ROWS + 3


def test_long_answers_are_cut() -> None:
    text = card(JOB, FACTS, [Sampled("tickets", 0, "p", "x" * 10_000, "r")])
    assert len(text) < 5000


def test_peft_is_named_only_where_it_has_the_method() -> None:
    assert "PeftModel" in card(JOB, FACTS, ())
    assert "PeftModel" not in card(replace(JOB, method=MethodSpec("bottleneck")), FACTS, ())
