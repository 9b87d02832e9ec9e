"""The tasks' rows are made, the same for everyone, and what is held out is never trained on."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from loraplex_training.data.problems import Problems
from loraplex_training.data.records import RecordFile

from examples.tasks import TASKS, contacts, routing, write
from examples.tasks.__main__ import main

DIGESTS = {
    "contacts": "681c6f2ecdd1841409a146e85d3b6e00721e628abb31b7dc408447538d6d9a8d",
    "routing": "004de51f366358fd9cf533b584e001201fae8df0bf7113ddc62743f3f76704e2",
}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_same_seed_gives_the_same_bytes_everywhere(task: str, tmp_path: Path) -> None:
    written = write(task, tmp_path / "new" / "a.jsonl", 240, 1).read_bytes()
    assert hashlib.sha256(written).hexdigest() == DIGESTS[task]
    assert write(task, tmp_path / "b.jsonl", 240, 2).read_bytes() != written


@pytest.mark.parametrize("task", sorted(TASKS))
def test_rows_differ_and_are_a_good_data_set(task: str, tmp_path: Path) -> None:
    problems = Problems()
    records = list(RecordFile(write(task, tmp_path / "a.jsonl", 240, 1), problems))
    problems.check()
    assert len({record.digest() for record in records}) == 240


@pytest.mark.parametrize("task", sorted(TASKS))
def test_no_row_held_out_is_ever_made_for_training(task: str) -> None:
    trained = {row["prompt"] for seed in range(20) for row in TASKS[task](240, seed)}
    held = {row["prompt"] for seed in range(5) for row in TASKS[task](100, seed, held_out=True)}
    assert not trained & held
    assert len(held) > 100


def test_contacts_hold_out_combinations_and_names() -> None:
    def parts(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
        read = [json.loads(row["completion"]) for row in rows]
        return [(one["name"], one["item"], one["city"]) for one in read]

    trained = {part for seed in range(20) for part in parts(contacts.rows(240, seed))}
    held = parts(contacts.rows(100, 0, held_out=True))
    assert not trained & set(held)
    names = {name for name, _, _ in trained}
    assert sum(name not in names for name, _, _ in held) == 50
    for position in (1, 2):  # things and cities are known, so what is tested is not a lucky guess
        assert {part[position] for part in held} <= {part[position] for part in trained}


def test_contacts_answers_are_in_the_sentence() -> None:
    for row in contacts.rows(300, 3):
        answer = json.loads(row["completion"])
        assert list(answer) == ["name", "item", "quantity", "city"]
        assert row["completion"] == json.dumps(answer)
        sentence = row["prompt"].removeprefix(contacts.QUESTION).lower()
        number = contacts.NUMBERS[answer["quantity"] - 1]
        plural = "s" if answer["quantity"] > 1 else ""
        assert answer["name"].lower() in sentence
        assert answer["city"].lower() in sentence
        assert re.search(rf"\b({number}|{answer['quantity']}) {answer['item']}{plural}\b", sentence)


def test_routing_covers_every_label_and_holds_out_a_sentence_of_each_queue() -> None:
    labels = {f"{queue}.{p}" for queue in routing.QUEUES for p in routing.PRIORITIES}
    rows = routing.rows(240, 1)
    assert {row["completion"] for row in rows} == labels
    unseen = [
        sentences[-1].format(thing=thing).lower()
        for sentences in routing.QUEUES.values()
        for thing in routing.THINGS
    ]
    assert not any(one in row["prompt"].lower() for row in rows for one in unseen)
    held = routing.rows(72, 1, held_out=True)
    assert {row["completion"] for row in held} == labels
    assert sum(any(one in r["prompt"].lower() for one in unseen) for r in held) == 36


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.jsonl"
    assert main(["contacts", "--count", "12", "--seed", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == write("contacts", tmp_path / "b", 12, 3).read_bytes()
    assert main(["routing", "--held-out", "--count", "99999", "--out", str(out)]) == 1
    assert "ask for fewer" in capsys.readouterr().err
