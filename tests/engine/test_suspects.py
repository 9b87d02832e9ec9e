"""Blame for lost engines, pauses before restarts, and signs of life: the deciding parts alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
from engine.driving import adapter
from engine.oracle import OracleRunner, continuation
from engine.test_process import ask
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import (
    AdapterRef,
    Attempt,
    Beat,
    Load,
    LoadDone,
    Output,
    SamplingParams,
    StepReport,
    Submit,
    Unload,
)
from loraplex_server.engine.process.handling import FAR_SECONDS, MAX_FAILURES, Handler, within_reach
from loraplex_server.engine.process.inbox import MAX_WAIT
from loraplex_server.engine.process.limits import RestartPolicy, SupervisionLimits
from loraplex_server.engine.process.pulse import Hang, PulseCheck
from loraplex_server.engine.process.suspects import Suspects

LIMITS = SupervisionLimits()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    return Clock()


# suspects


def begin(suspects: Suspects, *digests: str, work: str = "load") -> None:
    for digest in digests:
        suspects.attempt(Attempt(digest, work, begun=True))


@pytest.mark.fault("adapter-kills-engines")
def test_only_work_that_was_under_way_is_counted() -> None:
    suspects = Suspects(LIMITS)
    begin(suspects, "a", "b", "b")
    suspects.attempt(Attempt("a", "load", begun=False))
    suspects.attempt(Attempt("b", "load", begun=False))
    report = suspects.on_death([])
    assert report.suspects == {"b"}
    assert suspects.is_suspect("b")
    assert not suspects.is_suspect("a")
    assert suspects.on_death([]).suspects == frozenset()  # of the next process


@pytest.mark.fault("adapter-kills-engines")
def test_success_clears_suspicion_for_the_same_kind_of_work_only() -> None:
    suspects = Suspects(LIMITS)
    begin(suspects, "a", work="merge")
    suspects.on_death([])
    suspects.on_load(LoadDone("a", 0.1))
    begin(suspects, "a", work="merge")
    assert suspects.on_death([]).quarantined.keys() == {"a"}

    begin(suspects, "b")
    suspects.on_death([])
    suspects.on_load(LoadDone("b", 0.1))
    begin(suspects, "b")
    assert suspects.on_death([]).quarantined == {}


def test_a_request_is_known_by_its_content_and_refused_only_if_it_is_the_only_one(
    clock: Clock,
) -> None:
    suspects = Suspects(LIMITS, clock)

    def cause(id: int) -> Submit:
        return ask(id, [1], priority=id, deadline=float(id), sampling=SamplingParams(seed=id))

    companion = ask(50, [2])
    for id in range(LIMITS.request_deaths):
        assert suspects.on_death([cause(id), companion]).requests == 0
    assert not suspects.refuses(cause(9))
    suspects.on_finish(companion)
    assert suspects.on_death([cause(4), ask(51, [3])]).requests == 1
    assert suspects.refuses(cause(5))
    assert not suspects.refuses(companion)
    clock.now += 3601
    assert not suspects.refuses(cause(6))


def test_a_request_that_ran_at_an_end_is_a_suspect_until_it_finishes_or_for_an_hour(
    clock: Clock,
) -> None:
    suspects = Suspects(LIMITS, clock)
    suspects.on_death([ask(1, [1]), ask(2, [2])])
    suspects.on_finish(ask(3, [2]))
    assert suspects.ran_at_last_end(ask(4, [1]))
    assert not suspects.ran_at_last_end(ask(5, [2]))
    clock.now += 3601
    assert not suspects.ran_at_last_end(ask(6, [1]))


def test_a_request_that_waits_for_a_suspect_adapter_is_not_counted() -> None:
    suspects = Suspects(SupervisionLimits(adapter_deaths=9))
    for id in range(5):
        begin(suspects, "a")
        waiting = ask(id, [1], adapters=[AdapterRef("a", "")])
        assert suspects.on_death([waiting]).requests == 0


# pauses


@pytest.mark.fault("engine-lost-again")
def test_pauses_double_over_ends_and_are_reset_by_a_healthy_engine(clock: Clock) -> None:
    policy = RestartPolicy(SupervisionLimits(first_pause=1, longest_pause=6, healthy=60), clock)
    pauses = []
    for _ in range(5):
        policy.on_ready()
        clock.now += 59
        policy.on_end()
        pauses.append(policy.pause)
    assert pauses == [1, 2, 4, 6, 6]
    policy.on_ready()
    clock.now += 60
    policy.on_end()
    assert policy.pause == 1


@pytest.mark.fault("engine-lost-again")
def test_the_front_gives_up_after_many_ends_and_some_time(clock: Clock) -> None:
    policy = RestartPolicy(SupervisionLimits(most_ends=3, give_up=100), clock)
    for _ in range(50):
        policy.on_end()
    assert not policy.gives_up
    clock.now += 100
    assert policy.gives_up
    few = RestartPolicy(SupervisionLimits(most_ends=3, give_up=100), clock)
    for _ in range(3):
        few.on_end()
    clock.now += 1000
    assert not few.gives_up
    few.on_end()
    assert few.gives_up


# signs of life


@pytest.mark.fault("engine-hangs")
def test_a_pause_of_the_front_itself_is_not_held_against_the_engine() -> None:
    check = PulseCheck(silent_seconds=10, stuck_seconds=20)
    assert check.look(0.0) is None
    assert check.look(3600.0) is None
    now = 3600.0
    while (hang := check.look(now)) is None:
        now += check.tick
    assert hang is Hang.SILENT
    assert now - 3600 <= 11


@pytest.mark.fault("engine-hangs")
def test_messages_break_the_silence_but_only_turns_show_that_the_loop_runs() -> None:
    check = PulseCheck(silent_seconds=10, stuck_seconds=20)
    for now in range(9):
        check.heard(None)
        assert check.look(float(now)) is None
    while True:
        check.heard(Beat(turns=5, waiting=False))
        if (hang := check.look(float(now))) is not None:
            break
        now += 1
    assert hang is Hang.STUCK
    for later in range(now + 1, now + 60):
        check.heard(Beat(turns=5, waiting=True))
        assert check.look(float(later)) is None


# messages


def core() -> EngineCore:
    return EngineCore(OracleRunner())


def outputs(engine: EngineCore, steps: int = 20) -> list[Output]:
    found: list[Output] = []
    for _ in range(steps):
        for message in engine.step():
            if isinstance(message, StepReport):
                found += message.outputs
    return found


@pytest.mark.fault("message-ends-engine")
def test_an_exception_fails_its_message_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = core()
    handler = Handler(engine)
    scheduler = engine._scheduler
    enqueue = scheduler.enqueue

    def failing(request: object) -> None:
        enqueue(request)
        if request.id == 1:
            raise RuntimeError("a fault of the queue")

    monkeypatch.setattr(scheduler, "enqueue", failing)
    for id in range(3):
        assert handler.handle(ask(id, [id])) is None
    found = outputs(engine)
    assert [o.error.reason for o in found if o.id == 1] == ["ENGINE_FAULT"]
    for id in (0, 2):
        tokens = [token for o in found if o.id == id for token in o.token_ids]
        assert tokens == continuation([id], [], 5)
    assert engine.idle
    engine.check()


@pytest.mark.fault("message-ends-engine")
def test_an_order_that_raises_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = core()
    handler = Handler(engine)

    def fail(message: object) -> None:
        raise RuntimeError("a fault of the slots")

    monkeypatch.setattr(engine.adapters, "handle", fail)
    answer = handler.handle(Load(7, adapter("a")))
    assert answer is not None
    assert (answer.op, answer.error.reason) == (7, "ENGINE_FAULT")
    assert not handler.broken
    for op in range(MAX_FAILURES):
        handler.handle(Load(op, adapter("a")))
    assert handler.broken  # it fails everything: a new process may not
    monkeypatch.undo()
    assert handler.handle(ask(1, [1])) is None
    assert not handler.broken


@pytest.mark.fault("deadline-overflows")
@pytest.mark.parametrize("deadline", [math.nan, math.inf, 3.6e11, 1e308, -math.inf, -1.0, 0.0])
def test_no_deadline_is_beyond_what_a_queue_can_wait_for(deadline: float) -> None:
    for message in (ask(1, [1], deadline=deadline), Unload(1, "sha256:a", deadline=deadline)):
        near = within_reach(message).deadline
        assert near is not None
        assert not math.isnan(near)
        assert near < 1e9 + FAR_SECONDS


@pytest.mark.fault("deadline-overflows")
def test_a_deadline_that_is_no_number_has_passed_and_one_far_away_has_not() -> None:
    engine = core()
    handler = Handler(engine)
    for id, deadline in enumerate((math.nan, -math.inf, math.inf, 3.6e11)):
        handler.handle(ask(id, [id], deadline=deadline))
    ended = {o.id: o.error.reason if o.error else o.finish for o in outputs(engine)
             if o.error or o.finish}  # fmt: skip
    assert ended == {0: "DEADLINE_EXCEEDED", 1: "DEADLINE_EXCEEDED", 2: "length", 3: "length"}


def test_the_longest_wait_is_one_that_python_can_wait() -> None:
    assert threading.TIMEOUT_MAX > MAX_WAIT
