"""The whole engine against the oracle, under everything that can happen to it, in any order."""

from __future__ import annotations

from dataclasses import dataclass

from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from loraplex_server.engine.messages import AdapterRef, Load, Unload

BUDGET = 100
CATALOGUE: dict[str, dict[str, object]] = {
    "a": {"nbytes": 30},
    "b": {"nbytes": 40},
    "c": {"nbytes": 50},
    "d": {"nbytes": 60},
    "whole": {"nbytes": BUDGET},
    "larger": {"nbytes": BUDGET + 1},
    "bad": {"fail": "ADAPTER_INVALID"},
    "crash": {"fail": "crash"},
    "nan": {"nbytes": 10, "nonfinite": True},
}
NAMES = st.sampled_from([*"aaaaaabbbbcccd", *CATALOGUE])


@dataclass
class Asked:
    """A request as the test remembers it."""

    prompt: list[int]
    max_new_tokens: int
    refs: list[AdapterRef]
    stops: list[int]
    deadline: float | None
    prompt_logprobs: bool
    aborted: bool = False
    may_fault: bool = False
    was_unloaded: bool = False

    @property
    def names(self) -> list[str]:
        return [ref.digest.removeprefix("sha256:") for ref in self.refs]

    @property
    def expected(self) -> tuple[list[int], str]:
        """Its tokens and how it finishes, if nothing comes between."""
        mix = [(ref.digest, ref.weight) for ref in self.refs]
        tokens = continuation(self.prompt, mix, self.max_new_tokens)
        for at, token in enumerate(tokens):
            if token in self.stops:
                return tokens[:at], "stop"
        return tokens, "length"


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 24),
        block_size=st.integers(1, 4),
        num_slots=st.integers(1, 4),
        token_budget=st.integers(1, 16),
        max_running=st.integers(1, 6),
    )
    def start(
        self, num_blocks: int, block_size: int, num_slots: int, token_budget: int, max_running: int
    ) -> None:
        self.runner = OracleRunner(
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots,
            adapter_budget_bytes=BUDGET,
            fault_token=511,
        )
        self.max_waiting = 8
        self.engine = Engine(
            self.runner,
            token_budget=token_budget,
            max_running=min(max_running, token_budget),
            max_waiting=self.max_waiting,
            max_waiting_tokens=100,
            prompt_logprob_rows=3,
        )
        self.asked: dict[int, Asked] = {}
        self.ops: set[int] = set()
        self.faults = False

    @rule(
        size=st.integers(1, 20),
        start=st.integers(0, 50),
        max_new_tokens=st.integers(1, 10),
        names=st.lists(NAMES, max_size=3),
        weights=st.tuples(*[st.sampled_from([1.0, 0.5, -2.0])] * 3),
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
        asked = Asked(prompt, max_new_tokens, refs, [], deadline, prompt_logprobs)
        if stop_at is not None and stop_at < max_new_tokens:
            asked.stops = [asked.expected[0][stop_at]]
        request_id = len(self.asked) + 1
        self.asked[request_id] = asked
        self.faults |= faulty or self.runner.fault_token in asked.expected[0]
        self.engine.submit(
            request_id,
            prompt,
            max_new_tokens,
            adapters=refs,
            stop_token_ids=asked.stops,
            deadline=deadline,
            priority=priority,
            prompt_logprobs=1 if prompt_logprobs else None,
        )

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.asked)))
        if self.engine.outcome(request_id) is None:
            self.asked[request_id].aborted = True
        self.engine.core.abort(request_id)

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        self.ops.add(len(self.ops) + 1)
        self.engine.core.control(Load(len(self.ops), adapter(name, **CATALOGUE[name])))

    @rule(name=NAMES, force=st.booleans())
    def unload(self, name: str, force: bool) -> None:
        self.ops.add(len(self.ops) + 1)
        for request_id, asked in self.asked.items():
            if force and name in asked.names and self.engine.outcome(request_id) is None:
                asked.was_unloaded = True
        self.engine.core.control(Unload(len(self.ops), f"sha256:{name}", force))

    @precondition(lambda self: self.engine.loader.reading is not None)
    @rule()
    def finish_reading(self) -> None:
        self.engine.loader.finish()

    @precondition(lambda self: any(asked.deadline for asked in self.asked.values()))
    @rule(seconds=st.integers(1, 3))
    def let_time_pass(self, seconds: int) -> None:
        self.engine.clock.now += seconds

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
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
            elif outcome is not None:
                assert self.is_justified(asked, outcome), f"request {request_id}: {outcome}"
            if tokens:
                scored = self.engine.outputs[request_id][0].prompt_logprobs
                wanted = asked.prompt[1:] if asked.prompt_logprobs else []
                assert [entry.token_id for entry in scored] == wanted

    def is_justified(self, asked: Asked, reason: str) -> bool:
        names = set(asked.names)
        match reason:
            case "ADAPTER_INVALID":
                return "bad" in names
            case "ENGINE_FAULT":
                return "crash" in names or self.faults
            case "NON_FINITE_LOGITS":
                return "nan" in names
            case "ADAPTER_UNLOADED":
                return asked.was_unloaded
            case "DEADLINE_EXCEEDED":
                return asked.deadline is not None and asked.deadline <= self.engine.clock.now
            case "ADAPTER_TOO_LARGE":
                size = sum(int(str(CATALOGUE[name].get("nbytes", 1))) for name in names)
                return size > BUDGET or len(names) > self.runner.num_slots
            case "PROMPT_TOO_LONG":
                room = self.runner.num_blocks * self.runner.block_size
                return len(asked.prompt) + asked.max_new_tokens - 1 > room
            case "OVERLOADED":
                return len(self.asked) > 3
        return False

    @invariant()
    def books_balance_and_queues_are_bounded(self) -> None:
        if not hasattr(self, "engine"):
            return
        core = self.engine.core
        core._pool.check()
        core._residency.slots.check()
        held = [block for r in core._requests.values() for block in r.blocks]
        assert len(held) == len(set(held)) == core._pool.used
        never_started = [r for r in core._requests.values() if r.queue_seconds is None]
        assert len(never_started) <= self.max_waiting
        pins = [pin.digest for r in core._requests.values() for pin in r.pins]
        for digest, resident in core._residency.slots.residents.items():
            assert resident.refs == pins.count(digest)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run(most=5000)
        self.tokens_are_right_and_ends_are_justified()
        self.engine.core.check()
        for request_id, asked in self.asked.items():
            if asked.aborted:
                assert self.engine.outcome(request_id) is None
            else:
                assert self.engine.outcome(request_id) is not None
        assert set(self.engine.controls) == self.ops


EngineMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestEveryRequestEndsOnceWithTheRightTokens = EngineMachine.TestCase
