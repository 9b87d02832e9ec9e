"""The batch as the engine shows it: every request in one stage, and only when somebody asks."""

from __future__ import annotations

from engine.driving import AheadEngine, Engine, adapter
from engine.oracle import OracleRunner
from loraplex_server.engine.group.joining import join_views
from loraplex_server.engine.process.handling import Handler
from loraplex_server.engine.statistics import BatchView, Look


def test_every_unfinished_request_is_in_exactly_one_stage() -> None:
    for kind in (Engine, AheadEngine):
        engine = kind(OracleRunner(num_blocks=40), token_budget=8, max_running=3)
        for i in range(6):
            engine.submit(i, [20 + i] * 9, 4, adapters=[adapter("slow")] * (i == 5))
        seen: set[str] = set()
        for _ in range(200):
            view = engine.core.look(1)
            stages = {"prefill": view.prefill, "decode": view.decode, "waiting": view.waiting}
            listed = [each for stage in stages.values() for each in stage]
            assert len(set(listed)) == len(listed)
            assert set(listed) == {i for i in range(6) if engine.outcome(i) is None}
            assert view.max_rows == 3
            seen |= {name for name, stage in stages.items() if stage}
            if engine.core.idle:
                break
            engine.step()
            if engine.loader.jobs and view.waiting == [5]:
                engine.loader.finish()
        assert seen == set(stages)
        assert not listed


def test_figures_are_those_of_the_engine() -> None:
    engine = Engine(OracleRunner(num_blocks=40), token_budget=8, max_running=3)
    engine.submit(1, [20] * 9, 4, adapters=[adapter("a", nbytes=70)])
    engine.run()
    view = engine.core.look(7)
    assert (view.op, view.blocks, view.used_blocks) == (7, 40, 0)
    assert (view.adapter_bytes, view.adapter_bytes_limit) == (70, 1000)
    assert (view.generated_tokens, view.prompt_tokens) == (4, 8), "the ninth token is a row alone"
    assert view.steps == 5
    assert view.cached_blocks == 3, "twelve computed tokens are three full blocks"


def test_a_question_changes_nothing_and_wakes_nobody() -> None:
    engine = Engine()
    engine.submit(1, [20] * 9, 4)
    engine.run()
    engine.step()
    assert engine.core.wait_seconds() is None
    answer = Handler(engine.core).handle(Look(3))
    assert isinstance(answer, BatchView)
    assert answer.op == 3
    assert engine.core.wait_seconds() is None
    assert engine.core.step() == [], "the step after it has nothing to say"


def test_views_of_several_engines_are_summed() -> None:
    one = BatchView(1, [1], [2], [3], 4, 5, 6, 7, 8, 9, 10, 11, 12)
    two = BatchView(2, [11], [], [13], 1, 1, 1, 1, 1, 1, 1, 1, 1)
    joined = join_views([one, two])
    assert joined == BatchView(0, [1, 11], [2], [3, 13], 5, 6, 7, 8, 9, 10, 11, 12, 13)
