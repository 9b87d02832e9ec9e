"""What arrives while a pass is computed: requests are taken in at once, and nothing else is."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engine.driving import GREEDY, adapter
from engine.oracle import OracleRunner, continuation
from loraplex_model.base.batch import ForwardBatch
from loraplex_server.engine.adapters.loader import ThreadLoader
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import (
    Abort,
    AdapterRef,
    FromEngine,
    Output,
    Shutdown,
    StepReport,
    Submit,
    Unload,
)
from loraplex_server.engine.process.inbox import Inbox
from loraplex_server.engine.process.main import Outbox, serve
from loraplex_server.engine.process.pulse import Pulse

SECONDS = 30.0
"""Bound on every wait; none of them is long unless something is wrong."""


class HeldRunner(OracleRunner):
    """Computes passes at once, or, once they are `held`, waits with each for `release`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.held = False
        self.computing = threading.Event()
        self._go_on = threading.Semaphore(0)

    def forward(self, batch: ForwardBatch, states: np.ndarray | None = None) -> np.ndarray:
        if self.held:
            self.computing.set()
            assert self._go_on.acquire(timeout=SECONDS)
        return super().forward(batch, states)

    def release(self) -> None:
        """Lets all passes go on, this one and those to come."""
        self.held = False
        self._go_on.release()


class Kept(Outbox):
    """An outbox whose messages stay in this process."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()

    def send(self, *messages: FromEngine) -> None:
        for message in messages:
            self.messages.put(message)


class Serving:
    """The main loop on a thread of its own; the test's thread is the one that receives."""

    def __init__(self, max_running: int) -> None:
        self.runner = HeldRunner(num_blocks=1024)
        self.inbox = Inbox()
        loader = ThreadLoader(self.runner, wake=self.inbox.wake)
        limits = EngineLimits(max_running=max_running)
        self.core = EngineCore(self.runner, limits, loader=loader, meanwhile=self.inbox)
        self.outbox = Kept()
        self.outputs: dict[int, list[Output]] = {}
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        serve(self.core, self.inbox, self.outbox, Pulse())

    def submit(self, id: int, *tokens: int, new: int = 4, **fields: Any) -> None:
        self.inbox.put(Submit(id, [*(tokens or (5, 6))], new, sampling=GREEDY, **fields))

    def read(self, id: int) -> list[Output]:
        """The outputs of a request, when it has ended."""
        end = time.monotonic() + SECONDS
        while not (found := self.outputs.get(id)) or not _is_last(found[-1]):
            message = self.outbox.messages.get(timeout=max(0.01, end - time.monotonic()))
            if isinstance(message, StepReport):
                for output in message.outputs:
                    self.outputs.setdefault(output.id, []).append(output)
        return found

    def tokens(self, id: int) -> list[int]:
        return [token for output in self.read(id) for token in output.token_ids]

    def stop(self) -> None:
        self.runner.release()
        self.inbox.put(Shutdown())
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()


def _is_last(output: Output) -> bool:
    return output.finish is not None or output.error is not None


@pytest.fixture
def busy() -> Iterator[Serving]:
    """One row at a time, an answer under way and another waiting; its rates are known."""
    serving = Serving(max_running=1)
    for id in range(1, 9):
        serving.submit(id, new=20)
    for id in range(1, 9):
        serving.read(id)
    serving.runner.held = True
    serving.submit(10, new=400)
    assert serving.runner.computing.wait(SECONDS)
    serving.submit(11, new=400)
    yield serving
    serving.stop()


@pytest.mark.parametrize("adapters", [[], [adapter("a")]], ids=["base", "an adapter"])
def test_who_cannot_be_computed_in_time_learns_it_during_the_pass(
    busy: Serving, adapters: list[AdapterRef]
) -> None:
    busy.submit(20, new=400, deadline=time.monotonic() + 1e-4, adapters=adapters)
    (output,) = busy.read(20)
    assert busy.runner.held, "the pass has ended"
    assert output.error is not None
    assert output.error.reason == "DEADLINE_UNMEETABLE"


def test_who_is_accepted_during_a_pass_gets_the_tokens_of_its_adapter(busy: Serving) -> None:
    busy.submit(20, 7, 8, adapters=[adapter("a")])
    busy.submit(21, 7, 8)
    busy.inbox.put(Abort(10))
    busy.inbox.put(Abort(11))
    busy.runner.release()
    assert busy.tokens(20) == continuation([7, 8], [("sha256:a", 1.0)], 4)
    assert busy.tokens(21) == continuation([7, 8], [], 4)


def test_a_request_does_not_overtake_what_came_before_it(busy: Serving) -> None:
    busy.inbox.put(Unload(1, "sha256:a", time.monotonic() + SECONDS))
    busy.submit(20, deadline=time.monotonic() + 1e-4)
    assert [type(message) for message in busy.inbox.take(0.0)] == [Unload, Submit]
    assert busy.outbox.messages.empty()


def test_a_stream_of_requests_does_not_keep_the_next_pass_from_starting() -> None:
    inbox, added, stop = Inbox(), list[Submit](), threading.Event()

    def add(message: Submit) -> None:
        added.append(message)
        time.sleep(1e-4)

    def flood() -> None:
        while not stop.is_set():
            inbox.put(Submit(1, [5], 1, sampling=GREEDY))
            inbox.take(0.0)

    inbox.open_to(add)
    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(50):
            before = len(added)
            with inbox:
                while len(added) < before + 3:
                    time.sleep(1e-4)
                last = len(added)
            assert len(added) <= last + 2, "requests were taken in after the pass"
    finally:
        stop.set()
        thread.join(SECONDS)


def test_whatever_arrives_whenever_every_request_ends_once_and_with_its_tokens() -> None:
    serving, chance = Serving(max_running=4), random.Random(5)
    names = ["a", "b", "c"]
    asked: dict[int, tuple[list[int], str, bool]] = {}
    aborted = set()
    for id in range(1, 401):
        prompt = [chance.randrange(5, 30) for _ in range(chance.randint(1, 9))]
        name = chance.choice(["", *names])
        is_hasty = chance.random() < 0.2
        deadline = time.monotonic() + chance.uniform(1e-4, 0.01) if is_hasty else None
        refs = [adapter(name)] if name else []
        asked[id] = prompt, name, is_hasty
        serving.submit(id, *prompt, new=6, adapters=refs, deadline=deadline)
        if chance.random() < 0.05:
            aborted.add(id)
            serving.inbox.put(Abort(id))
        time.sleep(chance.choice([0.0, 0.0, 1e-4, 1e-3]))
    for id, (prompt, name, is_hasty) in asked.items():
        if id in aborted:
            continue
        *_, last = serving.read(id)
        if last.error is not None:
            assert is_hasty, last.error
            assert last.error.reason in ("DEADLINE_UNMEETABLE", "DEADLINE_EXCEEDED")
            continue
        mix = [(f"sha256:{name}", 1.0)] if name else []
        assert serving.tokens(id) == continuation(prompt, mix, 6)
    serving.stop()
    assert serving.core.idle
    serving.core.check()
