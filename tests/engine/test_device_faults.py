"""A device that lacks memory costs at most a batch, and one that is lost costs one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, command, continuation
from engine.test_lost_engine import adapter as lost_adapter
from engine.test_lost_engine import answers, fails, supervised
from engine.test_process import ask, drain, start_bare
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.engine.batching.scheduler import NARROW_STEPS
from loraplex_server.engine.messages import Load, StepStats
from loraplex_server.engine.process import wire
from loraplex_server.engine.process.main import EXIT_BROKEN
from loraplex_server.engine.runner.device_errors import DeviceErrors
from loraplex_server.engine.runner.protocol import DeviceLost, OutOfDeviceMemory

# too little memory in a step


def tokens_per_pass(engine: Engine) -> list[int]:
    return [len(batch.tokens) for batch in engine.runner.batches]


def stats(engine: Engine) -> StepStats:
    assert engine.last is not None
    return engine.last.stats


@pytest.mark.usefixtures("pace")
def test_a_pass_without_memory_is_made_smaller_and_nothing_is_lost() -> None:
    engine = Engine(OracleRunner(num_blocks=100, block_size=4), token_budget=40, max_running=8)
    engine.submit(1, [1] * 30, 4)
    engine.submit(2, [2] * 30, 4, adapters=[])
    engine.runner.out_of_memory = 1
    engine.run()
    assert max(tokens_per_pass(engine)) == 20  # half of the 40 that the failed pass had
    for id in (1, 2):
        assert engine.tokens(id) == continuation([id] * 30, [], 4)
    assert stats(engine).out_of_memory == 1
    assert not engine.core.broken
    engine.core.check()


@pytest.mark.usefixtures("pace")
def test_more_decode_rows_than_memory_allows_are_divided_among_the_next_steps() -> None:
    engine = Engine(OracleRunner(num_blocks=200), token_budget=64, max_running=8)
    for id in range(1, 9):
        engine.submit(id, [id], 12)
    for _ in range(4):
        engine.step()
    engine.runner.out_of_memory = 1
    before = len(engine.runner.batches)
    engine.run()
    assert max(tokens_per_pass(engine)[before + 1 :]) == 4
    for id in range(1, 9):
        assert engine.tokens(id) == continuation([id], [], 12)
    engine.core.check()


@pytest.mark.usefixtures("pace")
def test_a_pass_that_lacks_memory_twice_costs_its_rows_and_no_others() -> None:
    engine = Engine(OracleRunner(num_blocks=100), token_budget=16, max_running=8)
    engine.submit(1, [1] * 8, 6)
    engine.submit(2, [2] * 8, 6)
    engine.runner.out_of_memory = 2
    engine.run()
    assert engine.outcome(1) == "ENGINE_FAULT"  # it alone fits into the second, smaller pass
    assert engine.tokens(2) == continuation([2] * 8, [], 6)
    assert all("secret" not in str(output) for output in engine.outputs[1])
    assert stats(engine).out_of_memory == 2
    assert not engine.core.broken
    engine.core.check()


@pytest.mark.usefixtures("pace")
def test_the_budget_is_whole_again_after_some_steps() -> None:
    engine = Engine(OracleRunner(num_blocks=2000), token_budget=32, max_running=4)
    engine.submit(1, [1] * 900, 1)
    engine.runner.out_of_memory = 1
    engine.run()
    counts = tokens_per_pass(engine)
    assert counts[:NARROW_STEPS] == [16] * NARROW_STEPS
    assert counts[NARROW_STEPS] == 32
    assert engine.tokens(1) == continuation([1] * 900, [], 1)


@pytest.mark.usefixtures("pace")
def test_the_budget_halves_again_if_memory_runs_out_again_and_never_below_a_token() -> None:
    engine = Engine(OracleRunner(num_blocks=100), token_budget=8, max_running=4)
    engine.submit(1, [1] * 40, 3)
    for _ in range(6):
        engine.runner.out_of_memory = 1
        engine.step()
    engine.run()
    assert sorted(set(tokens_per_pass(engine)[:6]), reverse=True) == [4, 2, 1]
    assert engine.tokens(1) == continuation([1] * 40, [], 3)


# a device that is lost


@pytest.mark.parametrize("options", [{}, {"ahead": True}, {"ahead": True, "lost_at": "launch"}])
def test_an_engine_whose_device_is_lost_ends_at_once(options: dict[str, object]) -> None:
    process, ours = start_bare(lost_token=9, **options)
    with ours:
        ours.sendall(wire.encode(ask(1, [9], 5)))
        assert process.wait(60) == EXIT_BROKEN


async def test_a_lost_device_costs_the_requests_in_flight_and_the_engine_comes_back() -> None:
    async with supervised(command(lost_token=9, ahead=True, num_blocks=400)) as (client, observer):
        streams = [client.submit(ask(id, [id], 300)) for id in range(1, 5)]
        for stream in streams:
            await stream.take()
        streams.append(client.submit(ask(9, [9], 5)))
        for stream in streams:
            assert (await drain(stream))[1] == "ENGINE_RESTARTED"
        await observer.until(lambda: client.ready)
        assert len(observer.deaths) == 1
        assert await answers(client)


@pytest.mark.parametrize("doing", ["publish", "merge"])
async def test_an_adapter_that_loses_the_device_is_a_suspect(doing: str) -> None:
    async with supervised(command(merge_budget_bytes=100)) as (client, observer):
        bad = lost_adapter("bad", loses=doing, merge_nbytes=5)
        order = client.merge(bad) if doing == "merge" else client.load(bad)
        assert await fails(order) == "ENGINE_RESTARTED"
        await observer.until(lambda: client.ready)
        assert observer.deaths[-1][1].suspects == {"sha256:bad"}
        assert await answers(client)


@pytest.mark.usefixtures("pace")
def test_an_adapter_that_finds_no_memory_fails_alone() -> None:
    engine = Engine()
    engine.submit(1, [1], 9)
    publish = engine.runner.publish_adapter

    def lacking(*arguments: object) -> None:
        raise OutOfDeviceMemory("a secret of the allocator")

    engine.runner.publish_adapter = lacking  # type: ignore[method-assign]
    engine.core.control(Load(1, adapter("a")))
    engine.run()
    assert engine.controls[1].error is not None
    engine.runner.publish_adapter = publish  # type: ignore[method-assign]
    engine.core.control(Load(2, adapter("a")))
    engine.run()
    assert engine.controls[2].error is None
    assert engine.tokens(1) == continuation([1], [], 9)


# torch's errors


class FakeDevice:
    """A CUDA device that is not there."""

    def __init__(self, is_lost: bool = False) -> None:
        self.is_lost = is_lost
        self.probes = 0
        self.emptied: list[int] = []
        self.held: list[object] = []
        self.errors = DeviceErrors(torch.device("cuda", 0), self.probe, self.empty_cache)

    def probe(self, device: torch.device) -> None:
        self.probes += 1
        if self.is_lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def empty_cache(self) -> None:
        self.emptied.append(len([ref for ref in self.held if ref() is not None]))  # type: ignore[operator]


def failing(error: Exception) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_work_that_succeeds_is_left_alone() -> None:
    device = FakeDevice(is_lost=True)
    assert device.errors.replace(lambda: 3) == 3
    assert (device.probes, device.emptied) == (0, [])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_lack_of_memory_is_told_apart_after_the_cache_is_emptied(error: Exception) -> None:
    device = FakeDevice()
    with pytest.raises(OutOfDeviceMemory):
        device.errors.replace(failing(error))
    assert device.emptied == [0]


def test_the_memory_of_the_failed_work_is_free_when_the_cache_is_emptied() -> None:
    import weakref

    device = FakeDevice()

    def work() -> None:
        activations = torch.zeros(3)
        device.held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfDeviceMemory):
        device.errors.replace(work)
    assert device.emptied == [0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("anything that a broken context makes of it"),
    ],
)
def test_an_error_after_which_the_device_cannot_be_used_is_a_lost_device(error: Exception) -> None:
    with pytest.raises(DeviceLost) as lost:
        FakeDevice(is_lost=True).errors.replace(failing(error))
    assert lost.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: invalid argument"), ValueError("shapes differ")]
)
def test_an_error_after_which_the_device_works_stays_what_it_is(error: Exception) -> None:
    device = FakeDevice()
    with pytest.raises(type(error)) as raised:
        device.errors.replace(failing(error))
    assert raised.value is error
    assert device.probes == 1


def test_a_refusal_is_passed_on_without_a_look_at_the_device() -> None:
    device = FakeDevice(is_lost=True)
    with pytest.raises(Refusal):
        device.errors.replace(failing(Refusal(Reason.ADAPTER_INVALID, "text")))
    assert device.probes == 0


def test_on_a_processor_every_error_stays_what_it_is() -> None:
    errors = DeviceErrors(torch.device("cpu"), failing(AssertionError()), failing(AssertionError()))  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        errors.replace(failing(torch.OutOfMemoryError("CUDA out of memory")))
