"""Conservation on an engine that is never idle: nothing is lost, and nothing is kept."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import pytest
from engine.ahead_oracle import AheadOracle
from engine.driving import Engine, ManualLoader, adapter
from engine.oracle import OracleRunner, continuation
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import Load, Merge, SamplingParams, SetPinned, Unload, Unmerge

pytestmark = pytest.mark.usefixtures("pace")

LEAKS: dict[str, Callable[[EngineCore, Request], object]] = {
    "a block": lambda core, _: core._pool.reserve(1),
    "a shared block": lambda core, request: next(
        other for other in core._requests.values() if other is not request
    ).blocks.append(request.blocks[0]),
    "a pin": lambda core, _: core.adapters.slots.pin("sha256:a"),
    "a place": lambda core, request: core._scheduler.running.remove(request),
    "bytes on the device": lambda core, _: setattr(
        core.adapters.slots, "nbytes", core.adapters.slots.nbytes + 1
    ),
    "bytes in host memory": lambda core, _: setattr(
        core.adapters.host, "nbytes", core.adapters.host.nbytes + 1
    ),
    "a slot": lambda core, _: core.adapters.slots._free.pop(),
}


@pytest.mark.fault("memory-measured-idle")
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_noticed_while_requests_run(leak: str) -> None:
    engine = Engine(OracleRunner(num_blocks=400, host_budget_bytes=100))
    for id in (1, 2):
        engine.submit(id, [id], 400, adapters=[adapter("a", nbytes=10)])
    while not engine.tokens(2):
        engine.step()
        while engine.loader.jobs:
            engine.loader.finish()
    pass_time(engine, seconds=600.0)
    LEAKS[leak](engine.core, engine.core._requests[1])
    with pytest.raises(AssertionError):
        pass_time(engine, seconds=600.0)


def pass_time(engine: Engine, seconds: float) -> None:
    """Steps of half a minute each, in all of which the engine is busy."""
    end = engine.clock.now + seconds
    while engine.clock.now < end:
        engine.clock.now += 30.0
        engine.step()
        if engine.core.idle:
            pytest.fail("the engine was to be busy")


CODE = (ModuleType, type, FunctionType, BuiltinFunctionType, MethodType)


def size_of(core: EngineCore) -> tuple[int, int]:
    """Number and bytes of the objects that the core holds, without code and what tests own."""
    passed = (*CODE, OracleRunner, AheadOracle, ManualLoader)
    seen: dict[int, object] = {}
    todo: list[object] = [core]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, passed):
            continue
        seen[id(one)] = one
        todo += gc.get_referents(one)
    return len(seen), sum(map(sys.getsizeof, seen.values()))


class Traffic:
    """Random requests and orders; at least one request runs at any time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.runner = OracleRunner(
            num_blocks=60,
            prefix_blocks=6,
            num_slots=4,
            adapter_budget_bytes=200,
            host_budget_bytes=100,
            merge_budget_bytes=60,
        )
        self.engine = Engine(self.runner, max_running=5, max_waiting=20, token_budget=32)
        self.runner.keep_batches = False
        self.number = 0
        self.asked: dict[int, tuple[list[int], list[tuple[str, float]], int, int]] = {}

    def some_adapter(self) -> Any:
        # Mostly names that were never there before, so that what is kept of a name shows.
        fresh = self.random.random() < 0.7
        name = f"n{self.number}" if fresh else self.random.choice("abc")
        options: dict[str, Any] = {"nbytes": 40, "merge_nbytes": 20}
        if self.random.random() < 0.1:
            return adapter(f"bad{self.number}", fail="ADAPTER_INVALID")
        if self.random.random() < 0.2:
            return adapter(f"{name}v", nbytes=30, virtual=3)
        return adapter(name, **options)

    def submit(self) -> None:
        self.number += 1
        refs = [self.some_adapter()] if self.random.random() < 0.8 else []
        prompt = [self.random.randrange(500) for _ in range(self.random.randint(1, 12))]
        new = self.random.randint(1, 12)
        hot = self.random.random() < 0.3
        sampling = SamplingParams(temperature=50.0 if hot else 0.0, top_p=0.99, seed=self.number)
        if not hot:
            mix = [(ref.digest, ref.weight) for ref in refs]
            virtual = 3 * (bool(refs) and refs[0].digest.endswith("v"))
            self.asked[self.number] = prompt, mix, new, virtual
        self.engine.submit(
            self.number,
            prompt,
            new,
            adapters=refs,
            sampling=sampling,
            priority=self.random.randint(-100, 100),
            deadline=self.engine.clock.now + self.random.choice([1.0, 3600.0, 1e6]),
            prompt_logprobs=self.random.choice([None, None, 1]),
        )

    def order(self) -> None:
        self.number += 1
        ref, op = self.some_adapter(), self.number
        control = self.engine.core.control
        match self.random.randrange(6):
            case 0:
                control(Load(op, ref))
            case 1:
                control(SetPinned(op, ref, self.random.random() < 0.3))
            case 2:
                control(Merge(op, ref))
            case 3:
                control(Unmerge(op, ref.digest))
            case _:
                deadline = self.engine.clock.now + self.random.choice([0.5, 1e6])
                force = self.random.random() < 0.3
                control(Unload(op, replace_name(self.random, ref).digest, force, deadline))

    def step(self) -> None:
        while len(self.engine.core._requests) < 8:
            self.submit()
        if self.random.random() < 0.3:
            self.order()
        if self.random.random() < 0.1:
            self.engine.core.abort(self.number - self.random.randrange(8))
        while self.engine.loader.jobs and self.random.random() < 0.8:
            self.engine.loader.finish(self.random.randrange(len(self.engine.loader.jobs)))
        self.engine.clock.now += 0.05
        self.engine.step()
        for id, outputs in list(self.engine.outputs.items()):
            self.check_tokens(id)
            if outputs[-1].finish is not None or outputs[-1].error is not None:
                del self.engine.outputs[id]
        self.engine.controls.clear()
        self.engine.loads.clear()
        self.engine.merges.clear()

    def check_tokens(self, id: int) -> None:
        if id in self.asked:
            prompt, mix, new, virtual = self.asked[id]
            tokens = self.engine.tokens(id)
            assert tokens == continuation(prompt, mix, new, virtual=virtual)[: len(tokens)]
            if self.engine.outcome(id) is not None:
                del self.asked[id]


def replace_name(rng: random.Random, ref: Any) -> Any:
    """Another adapter that is probably on the device."""
    return adapter(rng.choice("abc")) if rng.random() < 0.7 else ref


def soak(steps: int, seed: int) -> list[tuple[int, int]]:
    """Sizes of everything that the core holds, after each eighth of the steps but the first."""
    print(f"seed {seed}")
    traffic = Traffic(seed)
    sizes: list[tuple[int, int]] = []
    for step in range(1, steps + 1):
        traffic.step()
        assert not traffic.engine.core.idle
        if step % 10 == 0 and hasattr(traffic.engine.core, "check_books"):
            traffic.engine.core.check_books()
        if step % (steps // 8) == 0 and step > steps // 8:
            sizes.append(size_of(traffic.engine.core))
    return sizes


@pytest.mark.fault("memory-measured-idle")
@pytest.mark.fault("deadlines-kept")
def test_what_a_busy_engine_holds_does_not_grow() -> None:
    sizes = soak(steps=1600, seed=random.randrange(1 << 30))
    print(sizes)
    objects = [count for count, _ in sizes]
    assert min(objects[-3:]) < 1.25 * max(objects[:3])


@pytest.mark.slow
@pytest.mark.fault("memory-measured-idle")
def test_what_a_busy_engine_holds_does_not_grow_over_many_steps() -> None:
    sizes = soak(steps=4000, seed=random.randrange(1 << 30))
    print(sizes)
    objects = [count for count, _ in sizes]
    assert min(objects[-3:]) < 1.2 * max(objects[:3])
