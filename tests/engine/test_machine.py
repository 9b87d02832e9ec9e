"""The whole engine against the oracle, under everything that can happen to it, in any order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation, invoked_at
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from loraplex_model.base.batch import ForwardBatch
from loraplex_server.engine.adapters.residency import UNLOADED
from loraplex_server.engine.core import FAULT, EngineCore
from loraplex_server.engine.messages import (
    AdapterRef,
    Load,
    Merge,
    SetPinned,
    Unload,
    Unmerge,
    Withdraw,
)
from loraplex_server.engine.runner.protocol import OutOfDeviceMemory

BUDGET = 100
CATALOGUE: dict[str, dict[str, object]] = {
    "a": {"nbytes": 30, "merge_nbytes": 30},
    "b": {"nbytes": 40, "merge_nbytes": 50},
    "c": {"nbytes": 50, "merge_nbytes": 10, "merge_fail": True},
    "d": {"nbytes": 60},
    "v": {"nbytes": 20, "virtual": 3},
    "w": {"nbytes": 1, "virtual": 5, "merge_nbytes": 20},
    "i": {"nbytes": 30, "invocation": [9, 10], "merge_nbytes": 10},
    "j": {"nbytes": 20, "invocation": [12]},
    "whole": {"nbytes": BUDGET},
    "larger": {"nbytes": BUDGET + 1},
    "bad": {"fail": "ADAPTER_INVALID"},
    "crash": {"fail": "crash"},
    "nan": {"nbytes": 10, "nonfinite": True},
}
NAMES = st.sampled_from([*"aaaaaabbbbcccdvvvwiii", *CATALOGUE])
CONTROL_REASONS = {
    "ADAPTER_INVALID",
    "ENGINE_FAULT",
    "ADAPTER_TOO_LARGE",
    "ADAPTER_UNLOADED",
    "PIN_BUDGET",
    "MERGE_BUDGET",
    "MERGE_UNSUPPORTED",
}


def option(name: str, key: str) -> int:
    return int(str(CATALOGUE[name].get(key, 0)))


@dataclass
class Asked:
    """A request as the test remembers it."""

    prompt: list[int]
    max_new_tokens: int
    refs: list[AdapterRef]
    stops: list[int]
    deadline: float | None
    prompt_logprobs: bool
    min_new_tokens: int = 0
    aborted: bool = False
    met_fault: bool = False
    met_full_queue: bool = False
    was_unloaded: bool = False

    @property
    def names(self) -> list[str]:
        return [ref.digest.removeprefix("sha256:") for ref in self.refs]

    @property
    def is_mixable(self) -> bool:
        if len(set(self.names)) > 1 and any("invocation" in CATALOGUE[n] for n in self.names):
            return False
        if not any(option(name, "virtual") for name in self.names):
            return True
        return len(set(self.names)) == 1 and sum(ref.weight for ref in self.refs) == 1.0

    @property
    def active(self) -> int | None:
        """Index of the prompt from which on its adapters act; None if they never do."""
        options = CATALOGUE[self.names[0]] if len(set(self.names)) == 1 else {}
        if "invocation" not in options:
            return 0
        return invoked_at(self.prompt, cast("list[int]", options["invocation"]))

    @property
    def expected(self) -> tuple[list[int], str]:
        """Its tokens and how it finishes, if nothing comes between."""
        mix = [(ref.digest, ref.weight) for ref in self.refs]
        virtual = option(self.names[0], "virtual") if self.names else 0
        tokens = continuation(
            self.prompt,
            mix,
            self.max_new_tokens,
            virtual=virtual,
            active=self.active,
            ends=frozenset(self.stops),
            least=self.min_new_tokens,
        )
        for at, token in enumerate(tokens):
            if token in self.stops:
                return tokens[:at], "stop"
        return tokens, "length"


class EngineMachine(RuleBasedStateMachine):
    engine_class: ClassVar[type[Engine]] = Engine
    shares: ClassVar[bool] = False

    @initialize(
        num_blocks=st.integers(3, 24) | st.just(40),
        block_size=st.integers(1, 4),
        num_slots=st.sampled_from([1, 2, 4, 4, 6]),
        token_budget=st.integers(1, 16),
        max_running=st.integers(1, 6),
        prefix_blocks=st.sampled_from([0, 3, 5, 8, 8]),
        host_budget=st.sampled_from([0, 50, 120, 1000]),
        merge_budget=st.sampled_from([0, 30, 70, 1000]),
        device=st.sampled_from(["cpu", "cuda:0"]),
        copy_polls=st.sampled_from([0, 0, 1, 3]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        token_budget: int,
        max_running: int,
        prefix_blocks: int,
        host_budget: int,
        merge_budget: int,
        device: str,
        copy_polls: int,
    ) -> None:
        self.runner = OracleRunner(
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots,
            adapter_budget_bytes=BUDGET,
            prefix_blocks=prefix_blocks,
            host_budget_bytes=host_budget,
            merge_budget_bytes=merge_budget,
            device=device,
            copy_polls=copy_polls,
            fault_token=511,
        )
        self.max_waiting = 8
        self.engine = self.engine_class(
            self.runner,
            token_budget=token_budget,
            max_running=min(max_running, token_budget),
            max_waiting=self.max_waiting,
            max_waiting_tokens=100,
            prompt_logprob_rows=3,
            prefix_cache=self.shares,
        )
        self.asked: dict[int, Asked] = {}
        self.ops: set[int] = set()
        self.withdrawn: set[int] = set()
        self.unloads: dict[int, str] = {}
        self.is_held = False
        self.is_second_attempt = False
        self.note_who_meets_a_fault()

    def note_who_meets_a_fault(self) -> None:
        """Marks the requests of a pass that fails: those that own a block that the pass writes."""
        forward = self.runner.forward

        def noting(batch: ForwardBatch) -> np.ndarray:
            try:
                logits = forward(batch)
            except Exception as error:
                self.meet(error, self.owners(batch))
                raise
            self.is_second_attempt = False
            return logits

        self.runner.forward = noting  # type: ignore[method-assign]

    def owners(self, batch: ForwardBatch) -> list[int]:
        """The unfinished requests that own a block that the pass writes."""
        size, written = self.runner.block_size, set[int]()
        for at, table in enumerate(batch.block_tables):
            first, end = batch.query_starts[at], batch.query_starts[at + 1]
            written |= {int(table[p // size]) for p in batch.positions[first:end]}
        requests = self.engine.core._requests.values()
        return [request.id for request in requests if written & set(request.blocks)]

    def meet(self, error: Exception, ids: list[int]) -> None:
        """Marks the requests of a failed pass; the first lack of memory of a step costs nothing."""
        if isinstance(error, OutOfDeviceMemory) and not self.is_second_attempt:
            self.is_second_attempt = True
            return
        self.is_second_attempt = False
        for id in ids:
            self.asked[id].met_fault = True

    @rule(
        size=st.integers(1, 8) | st.integers(1, 20),
        start=st.integers(0, 50),
        max_new_tokens=st.integers(0, 10),
        min_new_tokens=st.sampled_from([0, 0, 1, 2, 5, 10]),
        names=st.lists(NAMES, max_size=1) | st.lists(NAMES, max_size=3),
        weights=st.just((1.0, 1.0, 1.0)) | st.tuples(*[st.sampled_from([1.0, 0.5, -2.0])] * 3),
        priority=st.integers(-1, 1),
        patience=st.none() | st.integers(1, 30),
        stop_at=st.none() | st.integers(0, 9),
        prompt_logprobs=st.booleans(),
        faulty=st.sampled_from([False] * 15 + [True]),
    )
    def submit(
        self,
        size: int,
        start: int,
        max_new_tokens: int,
        min_new_tokens: int,
        names: list[str],
        weights: tuple[float, ...],
        priority: int,
        patience: int | None,
        stop_at: int | None,
        prompt_logprobs: bool,
        faulty: bool,
    ) -> None:
        prompt = [start + i % 7 for i in range(size)]
        if faulty:
            prompt[-1] = self.runner.fault_token
        refs = [adapter(n, w, **CATALOGUE[n]) for n, w in zip(names, weights, strict=False)]
        deadline = None if patience is None else self.engine.clock.now + patience
        least = min(min_new_tokens, max_new_tokens)
        asked = Asked(prompt, max_new_tokens, refs, [], deadline, prompt_logprobs, least)
        if stop_at is not None and stop_at < max_new_tokens:
            asked.stops = [asked.expected[0][stop_at]]
        request_id = len(self.asked) + 1
        self.asked[request_id] = asked
        waiting = [r for r in self.engine.core._requests.values() if r.queue_seconds is None]
        tokens = sum(r.prompt_len for r in waiting) + size
        asked.met_full_queue = len(waiting) >= self.max_waiting or bool(waiting and tokens > 100)
        asked.was_unloaded = any(
            name in asked.names and op not in self.engine.controls
            for op, name in self.unloads.items()
        )
        self.engine.submit(
            request_id,
            prompt,
            max_new_tokens,
            adapters=refs,
            stop_token_ids=asked.stops,
            min_new_tokens=least,
            deadline=deadline,
            priority=priority,
            prompt_logprobs=1 if prompt_logprobs else None,
            account="+".join(names),
        )

    @rule(
        names=st.lists(st.sampled_from(["", "a", "b", "v", "w", "i", "j"]), min_size=1, max_size=4),
        size=st.integers(1, 8),
        max_new_tokens=st.integers(2, 10),
    )
    def submit_a_burst(self, names: list[str], size: int, max_new_tokens: int) -> None:
        for name in names:
            one = [name] if name else []
            self.submit(size, 7, max_new_tokens, 0, one, (1.0,), 0, None, None, False, False)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.asked)))
        if self.engine.outcome(request_id) is None:
            self.asked[request_id].aborted = True
        self.engine.core.abort(request_id)

    @rule(passes=st.sampled_from([1, 1, 1, 2, 3]))
    def run_out_of_memory(self, passes: int) -> None:
        self.runner.out_of_memory = passes

    def next_op(self) -> int:
        self.ops.add(len(self.ops) + 1)
        return len(self.ops)

    @rule(name=NAMES, kind=st.sampled_from(["load", "pin", "unpin", "merge"]))
    def order(self, name: str, kind: str) -> None:
        op, ref = self.next_op(), adapter(name, **CATALOGUE[name])
        self.is_held |= kind in ("pin", "merge")
        match kind:
            case "load":
                self.engine.core.control(Load(op, ref))
            case "merge":
                self.engine.core.control(Merge(op, ref))
            case _:
                self.engine.core.control(SetPinned(op, ref, kind == "pin"))

    @rule(name=NAMES)
    def unmerge(self, name: str) -> None:
        self.engine.core.control(Unmerge(self.next_op(), f"sha256:{name}"))

    @rule(name=NAMES, force=st.booleans(), patience=st.none() | st.integers(0, 9))
    def unload(self, name: str, force: bool, patience: int | None) -> None:
        for request_id, asked in self.asked.items():
            aborts = force or patience is not None
            if aborts and name in asked.names and self.engine.outcome(request_id) is None:
                asked.was_unloaded = True
        deadline = None if patience is None else self.engine.clock.now + patience
        message = Unload(self.next_op(), f"sha256:{name}", force, deadline)
        if patience is not None:
            self.unloads[message.op] = name
        self.engine.core.control(message)

    @precondition(lambda self: self.ops)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(sorted(self.ops)))
        self.withdrawn.add(op)
        self.engine.core.control(Withdraw(op))

    @precondition(lambda self: self.engine.loader.jobs)
    @rule(last=st.booleans(), seconds=st.sampled_from([0.0, 0.1, 5.0]))
    def finish_a_job(self, last: bool, seconds: float) -> None:
        self.engine.loader.finish(-1 if last else 0, seconds)

    @precondition(lambda self: any(asked.deadline for asked in self.asked.values()))
    @rule(seconds=st.integers(1, 3))
    def let_time_pass(self, seconds: int) -> None:
        self.engine.clock.now += seconds

    @rule(times=st.integers(1, 8), is_loader_fast=st.booleans())
    def step(self, times: int, is_loader_fast: bool) -> None:
        for _ in range(times):
            while is_loader_fast and self.engine.loader.jobs:
                self.engine.loader.finish()
            self.engine.step()
            for request_id, asked in self.asked.items():
                if asked.deadline is not None and asked.deadline <= self.engine.clock.now:
                    over = asked.aborted or self.engine.outcome(request_id) is not None
                    assert over, "a deadline passed and the request goes on"

    @invariant()
    def tokens_are_right_and_ends_are_justified(self) -> None:
        for request_id, asked in getattr(self, "asked", {}).items():
            outcome = self.engine.outcome(request_id)
            tokens = self.engine.tokens(request_id)
            expected, finish = asked.expected
            assert tokens == expected[: len(tokens)], f"request {request_id}: wrong tokens"
            if outcome in ("stop", "length"):
                assert (tokens, outcome) == (expected, finish)
                assert not {"larger", "bad", "crash", "nan"} & set(asked.names)
                assert asked.is_mixable
            elif outcome is not None:
                assert self.is_justified(asked, outcome), f"request {request_id}: {outcome}"
            if tokens or outcome in ("stop", "length"):
                scored = self.engine.outputs[request_id][0].prompt_logprobs
                wanted = asked.prompt[1:] if asked.prompt_logprobs else []
                assert [entry.token_id for entry in scored] == wanted

    def is_justified(self, asked: Asked, reason: str) -> bool:
        names = set(asked.names)
        match reason:
            case "ADAPTER_INVALID":
                return "bad" in names
            case "ENGINE_FAULT":
                return "crash" in names or asked.met_fault
            case "NON_FINITE_LOGITS":
                return "nan" in names
            case "ADAPTER_UNLOADED":
                # One that was asked for while an unload was under way may meet its deadline.
                return asked.was_unloaded
            case "DEADLINE_EXCEEDED":
                return asked.deadline is not None and asked.deadline <= self.engine.clock.now
            case "DEADLINE_UNMEETABLE":
                # Rates are known only if time passes during passes, which are launched ahead then.
                return self.engine.is_ahead and asked.deadline is not None
            case "ADAPTER_TOO_LARGE":
                return self.are_too_large(names)
            case "ADAPTER_NOT_MIXABLE":
                return not asked.is_mixable
            case "PROMPT_TOO_LONG":
                room = self.runner.num_blocks * self.runner.block_size
                virtual = option(asked.names[0], "virtual") if names else 0
                own = virtual % self.runner.block_size + len(asked.prompt)
                return own + max(1, asked.max_new_tokens) - 1 > room
            case "OVERLOADED":
                return asked.met_full_queue
        return False

    def are_too_large(self, names: set[str]) -> bool:
        """Whether they cannot be there together, beside as much as may be held."""
        share = 2 if self.is_held else 1
        blocks = [-(-option(name, "virtual") // self.runner.block_size) for name in names]
        return (
            share * sum(option(name, "nbytes") or 1 for name in names) > BUDGET
            or share * len(names) > self.runner.num_slots
            or share * sum(blocks) > self.runner.prefix_blocks
        )

    @invariant()
    def books_balance_and_queues_are_bounded(self) -> None:
        if not hasattr(self, "engine"):
            return
        core = self.engine.core
        core.check_books()
        core._pool.check()
        core.adapters.slots.check()
        core.adapters.host.check()
        core.adapters.merging.check()
        held = [block for r in core._requests.values() for block in r.blocks]
        assert len(set(held)) == core._pool.used
        assert self.shares or len(held) == len(set(held))
        never_started = [r for r in core._requests.values() if r.queue_seconds is None]
        assert len(never_started) <= self.max_waiting
        pins = [pin.digest for r in core._requests.values() for pin in r.pins]
        residents = core.adapters.slots.residents
        for digest, resident in residents.items():
            assert resident.refs == pins.count(digest)
            merged = self.runner.merges.get(resident.slot)
            assert resident.merged_bytes == (merged.nbytes if merged else 0)
        by_order = [r for r in residents.values() if r.held and not r.draining]
        assert 2 * sum(r.nbytes for r in by_order) <= BUDGET
        assert sum(m.nbytes for m in self.runner.merges.values()) <= self.runner.merge_budget_bytes
        assert all(
            done.error is None or done.error.reason in CONTROL_REASONS
            for done in self.engine.controls.values()
        )

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.runner.out_of_memory = 0
        self.engine.run(most=5000)
        self.tokens_are_right_and_ends_are_justified()
        self.engine.core.check()
        for request_id, asked in self.asked.items():
            if asked.aborted:
                assert self.engine.outcome(request_id) is None
            else:
                assert self.engine.outcome(request_id) is not None
        assert set(self.engine.controls) | self.withdrawn == self.ops
        self.memory_goes_back_to_the_start()

    def memory_goes_back_to_the_start(self) -> None:
        for name in CATALOGUE:
            self.engine.core.control(Unload(self.next_op(), f"sha256:{name}"))
        self.engine.run()
        core = self.engine.core
        core.check()
        assert core.adapters.slots.residents == core.adapters.host.adapters == {}
        assert (
            core.adapters.slots.nbytes
            == core.adapters.host.nbytes
            == core.adapters.merging.nbytes
            == 0
        )
        assert core.adapters.slots.prefix_blocks == core._pool.used == 0
        assert self.runner.merges == self.runner.prefixes == {}
        assert set(self.runner.slots) == {None}


EngineMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestEveryRequestEndsOnceWithTheRightTokens = EngineMachine.TestCase
for _name in ("memory-measured-idle", "right-weights-excused"):
    pytest.mark.fault(_name)(TestEveryRequestEndsOnceWithTheRightTokens)


def machine_with_a_fault() -> EngineMachine:
    """A machine of which one request waits for its adapter while the pass of another one fails."""
    machine = EngineMachine()
    machine.start(24, 4, 4, 16, 6, 0, 0, 0, "cpu", 0)
    machine.submit(3, 1, 4, 0, ["a"], (1.0,), 0, None, None, False, faulty=False)
    machine.submit(3, 1, 4, 0, [], (1.0,), 0, None, None, False, faulty=True)
    machine.step(1, is_loader_fast=False)
    return machine


@pytest.mark.fault("right-weights-excused")
def test_the_oracle_notices_a_fault_that_costs_another_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = machine_with_a_fault()
    honest.tokens_are_right_and_ends_are_justified()
    assert (honest.engine.outcome(1), honest.engine.outcome(2)) == (None, "ENGINE_FAULT")

    def end_all(core: EngineCore, *_: object) -> None:
        for request in list(core._requests.values()):
            core._end(request, FAULT)

    monkeypatch.setattr(EngineCore, "_fault", end_all)
    spreading = machine_with_a_fault()
    assert spreading.engine.outcome(1) == "ENGINE_FAULT"
    with pytest.raises(AssertionError, match="request 1: ENGINE_FAULT"):
        spreading.tokens_are_right_and_ends_are_justified()


@pytest.mark.fault("right-weights-excused")
def test_the_oracle_notices_an_unload_that_costs_a_later_request() -> None:
    """An unload that is answered excuses no request that arrives afterwards."""
    machine = EngineMachine()
    machine.start(24, 4, 4, 16, 6, 0, 0, 0, "cpu", 0)
    machine.unload("a", force=False, patience=5)
    machine.step(2, is_loader_fast=True)
    assert set(machine.engine.controls) == {1}
    machine.submit(3, 1, 4, 0, ["a"], (1.0,), 0, None, None, False, faulty=False)
    request = machine.engine.core._requests[1]
    machine.engine.core._end(request, UNLOADED)
    machine.step(1, is_loader_fast=False)
    with pytest.raises(AssertionError, match="request 1: ADAPTER_UNLOADED"):
        machine.tokens_are_right_and_ends_are_justified()
