"""The demo's verdicts: each check can fail, and fails for the right thing."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import demo_checks
import pytest
from adapters.adapter_files import SMOLLM
from demo import digest_of
from demo_checks import HttpAnswer, Steps
from demo_view import SideBySide
from loraplex import Completion, FinishReason, ResolvedAdapter, Usage
from loraplex_adapters.format import examine as adapter_format
from loraplex_server.engine.messages import StepReport, StepStats
from loraplex_server.metrics import Metrics
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from served import ServerError

PIRATE = "Arr, matey! A lighthouse be a tower."
JSON = '{"topic": "lighthouse", "answer": "A tower."}'


def completion(text: str, tokens: tuple[int, ...] = (1, 2), digest: str = "") -> Completion:
    adapters = (ResolvedAdapter("x", 1, digest, 1.0),) if digest else ()
    return Completion(text, tokens, FinishReason.STOP, Usage(3, len(tokens)), adapters, "id")


def step(distinct: int, base_rows: int) -> StepReport:
    stats = StepStats(
        step=1, step_seconds=0.01, decode_rows=3, prefill_tokens=0, distinct_adapters=distinct,
        base_rows=base_rows, running=3, waiting=0, free_blocks=1, used_blocks=1,
        preemptions=0, adapter_bytes=0, evictions=0,
    )  # fmt: skip
    return StepReport(outputs=[], stats=stats)


@pytest.mark.parametrize(
    "text",
    ["", "A tower.", '{"topic": "x"}', '{"topic": "x", "answer": ""}', JSON + " and more", "[]",
     '{"topic": "x", "answer": 3}', '{"topic": "x", "answer": "y", "z": "w"}', "Arr"],
)  # fmt: skip
def test_only_an_object_with_topic_and_answer_counts_as_json(text: str) -> None:
    assert not demo_checks.is_json(text)
    assert demo_checks.is_json(JSON)


def test_behaviour_is_held_only_by_answers_that_differ_as_claimed() -> None:
    good = {"base": "A tower.", "pirate": PIRATE, "json": JSON}

    def held(**changed: str) -> list[bool]:
        texts = {**good, **changed}
        answers = {name: completion(text) for name, text in texts.items()}
        return [check.held for check in demo_checks.behaviour(answers)]

    assert held() == [True, True, True, True]
    assert held(pirate="A tower.") == [False, True, True, True]
    assert held(base=PIRATE) == [True, False, True, True]
    assert held(json="A tower.") == [True, True, False, True]
    assert held(base=JSON) == [True, True, True, False]


def test_an_answer_by_other_weights_fails() -> None:
    answers = {
        "base": completion("a"),
        "pirate": completion("b", digest="sha256:1"),
        "json": completion("c", digest="sha256:1"),
    }
    expected = {"pirate": "sha256:1", "json": "sha256:2"}
    assert [check.held for check in demo_checks.digests(answers, expected)] == [True, True, False]
    swapped = {**answers, "base": completion("a", digest="sha256:1"), "pirate": completion("b")}
    assert [check.held for check in demo_checks.digests(swapped, expected)] == [False] * 3


def test_another_answer_over_http_fails_and_so_does_another_adapter() -> None:
    same = completion("b", digest="sha256:1")
    (served,) = same.adapters
    name = f"{served.name}@{served.version} sha256:1"
    assert demo_checks.over_http(HttpAnswer("b", name), same).held
    for text, adapter in (("a", name), ("", name), ("b", ""), ("b", name + "2")):
        assert not demo_checks.over_http(HttpAnswer(text, adapter), same).held


def test_one_changed_token_fails_and_so_does_an_empty_answer() -> None:
    alone = {"base": completion("x", (1, 2, 3)), "pirate": completion("y", ())}
    together = {"base": completion("x", (1, 2, 4)), "pirate": completion("y", ())}
    assert [c.held for c in demo_checks.same_as_alone(together, alone)] == [False, False]
    assert [c.held for c in demo_checks.same_as_alone(alone, alone)] == [True, False]


def test_steps_are_read_from_what_the_server_exports() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)

    def scrape() -> demo_checks.Samples:
        return demo_checks.parse_metrics(generate_latest(registry).decode())

    for distinct, base_rows in [(2, 1), (1, 0)]:  # before the batch: must not count
        metrics.on_step(step(distinct, base_rows))
    before = scrape()
    for distinct, base_rows in [(2, 1), (2, 1), (2, 0), (1, 1), (0, 1)]:
        metrics.on_step(step(distinct, base_rows))
    steps = demo_checks.steps_between(before, scrape())
    assert steps.total == 5
    assert {n: count for n, count in steps.by_distinct.items() if count} == {0: 1, 1: 1, 2: 3}
    assert steps.with_base == 4
    assert steps.most_distinct == 2
    assert steps.certainly_mixed(2) == 2  # 3 + 4 of 5: both of them in two steps at least
    assert demo_checks.one_batch(steps, 2).held


@pytest.mark.parametrize(
    "steps",
    [
        Steps(10, {0: 5, 2: 5}, 5),  # the adapters' steps and the base's may be apart
        Steps(10, {1: 10}, 10),  # never two adapters
        Steps(0, {}, 0),
    ],
)
def test_steps_that_may_never_have_been_mixed_fail(steps: Steps) -> None:
    assert not demo_checks.one_batch(steps, 2).held


@pytest.mark.parametrize("terminal", [True, False])
def test_every_answer_is_shown_whole_in_a_terminal_and_in_a_pipe(terminal: bool) -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with SideBySide(console, ["base", "pirate"]) as view:
        for word in ("[tall] ", "tower"):
            view.add("base", word)
            view.add("pirate", word.upper())
        view.done("pirate")
        view.done("base")
    shown = out.getvalue()
    assert "[tall] tower" in shown
    assert "[TALL] TOWER" in shown
    assert "base" in shown
    assert "pirate" in shown


def test_a_missing_adapter_is_an_error_that_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"train_demo_adapters\.py"):
        digest_of(tmp_path)


def test_the_digest_is_the_one_that_the_server_gives() -> None:
    directory = Path(demo_checks.__file__).parent / "adapters" / "pirate"
    assert digest_of(directory) == adapter_format.inspect(directory, SMOLLM).digest
