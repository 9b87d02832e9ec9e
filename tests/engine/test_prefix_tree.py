"""The trees against a dictionary of token tuples, whatever is done to the requests that use them.

A cell of the KV memory holds all that a token's keys and values depend on, in full: every token
before it, and how each of them was computed. The dictionary has the same for every kept block.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex_server.engine.batching.activation import active_from
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.prefix_cache import PrefixCache, vouch
from loraplex_server.engine.batching.prefix_tree import PrefixTree, Root
from loraplex_server.engine.batching.request import MergeState, Pin, Prefix, Request, RequestState
from loraplex_server.engine.batching.sampler import Draw
from loraplex_server.engine.messages import AdapterRef, SamplingParams, Submit

INVOCATION = [3]
TOKENS = st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=1, max_size=14)
PROMPTS = TOKENS | st.integers(1, 14).map(lambda n: [1] * n)

State = tuple[Any, ...]
"""How a token is computed: digests, weights and merge of its adapters; () by the base alone."""

Beginning = tuple[tuple[int, State], ...]
"""Tokens and their states, from the first virtual token to the last of a block."""


class TreeMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(4, 16), size=st.integers(1, 4))
    def start(self, blocks: int, size: int) -> None:
        self.pool = BlockPool(blocks, size)
        self.cache = PrefixCache(self.pool)
        forget = self.pool.on_forget
        self.memory: dict[tuple[int, int], Beginning] = {}
        self.kept: dict[tuple[str, bool, Beginning], int] = {}
        self.merges = {name: MergeState() for name in "abci"}
        self.merge_count = self.submitted = self.evicted = 0
        self.running: list[Request] = []
        self.queued: list[Request] = []

        def forgetting(block: int) -> None:
            self.evicted += 1
            forget(block)
            self.lose(block)

        self.pool.on_forget = forgetting

    def lose(self, block: int) -> None:
        self.kept = {key: one for key, one in self.kept.items() if one != block}

    # what a request would compute now

    def beginning(self, request: Request, end: int) -> Beginning:
        virtual = tuple((-1 - at, (request.pins[0].digest,)) for at in range(request.prefix.rest))
        weights = [weight.hex() for _, weight in request.mix]  # 0.0 and -0.0 are two
        named = tuple((p.digest, w) for p, w in zip(request.pins, weights, strict=True))
        state: State = named and (*named, request.copies.merge if request.sole_adapter else 0)
        own = [
            (token, state if at >= request.active_from else ())
            for at, token in enumerate(request.tokens[:end])
        ]
        return (*virtual, *own)

    def key(self, request: Request, end: int) -> tuple[str, bool, Beginning]:
        return request.submit.cache_salt, request.is_long, self.beginning(request, end)

    def ends(self, request: Request) -> list[int]:
        size, rest = self.pool.block_size, request.prefix.rest
        return list(range(size - rest, len(request.tokens) + 1, size))

    # rules

    @rule(
        prompt=PROMPTS,
        names=st.sampled_from(["", "", "a", "a", "b", "ab", "c", "i", "i"]),
        weight=st.sampled_from([1.0, 1.0, 0.5, -0.0, 0.0]),
        salt=st.sampled_from(["", "", "", "tenant"]),
        is_long=st.sampled_from([False, False, True]),
        scored=st.sampled_from([False] * 7 + [True]),
    )
    def submit(
        self, prompt: list[int], names: str, weight: float, salt: str, is_long: bool, scored: bool
    ) -> None:
        self.submitted += 1
        refs = [AdapterRef(name, "", weight) for name in names]
        most = 40 if is_long else 1
        wanted = 0 if scored else None
        submit = Submit(self.submitted, prompt, most, refs, cache_salt=salt, prompt_logprobs=wanted)
        request = Request(submit, (0.0, self.submitted), 0.0, Draw(SamplingParams(), prompt))
        request.short_positions = 30
        request.pins = tuple(Pin(name, at, 1) for at, name in enumerate(names))
        request.mix = tuple((at, weight) for at in range(len(names)))
        if len(names) == 1:
            request.copies = self.merges[names]
        if names == "c" and self.pool.block_size > 1:
            request.prefix = Prefix(1, (), 1, 99)
        request.active_from = active_from(request.tokens, INVOCATION) if names == "i" else 0
        request.state = RequestState.QUEUED
        self.queued.append(request)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.queued))
        found = list(self.cache.find(request))
        assert self.cache.kept(request) == self.cache._end(request, len(found))
        self.note_drops()
        self.found_is_right(request, [node.block for node in found])
        need = self.pool.blocks_for(request.in_own_blocks) - len(found)
        unowned = sum(not self.pool.owners(node.block) for node in found)
        if need + unowned > self.pool.free:
            return
        self.queued.remove(request)
        self.cache.begin(request)
        request.blocks.extend(self.pool.reserve(need))
        request.state = RequestState.RUNNING
        self.running.append(request)

    def found_is_right(self, request: Request, blocks: list[int]) -> None:
        """Exactly the longest beginning that the dictionary has, but for one token."""
        expected = []
        for end in self.ends(request):
            key = self.key(request, end)
            if end >= len(request.tokens) or request.wants_prompt_logits or key not in self.kept:
                break
            expected.append(self.kept[key])
        assert blocks == expected
        for block, end in zip(blocks, self.ends(request), strict=False):
            assert self.memory[block, self.pool.block_size - 1] == self.beginning(request, end)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 6))
    def compute(self, data: st.DataObject, count: int) -> None:
        request = data.draw(st.sampled_from(self.running))
        held = request.blocks.tolist()
        self.cache.awaits(request, set())
        for block, end in zip(request.blocks, self.ends(request), strict=False):
            if block not in held:
                assert self.memory[block, self.pool.block_size - 1] == self.beginning(request, end)
        end = min(request.computed + count, len(request.tokens))
        size, rest = self.pool.block_size, request.prefix.rest
        for at in range(request.computed, end):
            block, place = request.blocks[(at + rest) // size], (at + rest) % size
            assert block not in self.kept.values(), "a kept block is written"
            assert self.pool.owners(block) == 1
            before = self.read(request, at)
            token = self.beginning(request, at + 1)[-1]
            self.memory[block, place] = (*before, token)
        request.computed = end
        self.cache.keep(request, end)
        self.note_kept(request)

    def read(self, request: Request, at: int) -> Beginning:
        """What is in the memory just before the request's token `at`."""
        size, place = self.pool.block_size, at + request.prefix.rest - 1
        if at == 0:
            return self.beginning(request, 0)
        return self.memory[request.blocks[place // size], place % size]

    def note_kept(self, request: Request) -> None:
        salt, is_long = request.submit.cache_salt, request.is_long
        for node, end in zip(request.path, self.ends(request), strict=False):
            content = self.memory[node.block, self.pool.block_size - 1]
            assert [token for token, _ in content if token > 0] == request.tokens[:end].tolist()
            if node.is_kept:
                assert self.kept.setdefault((salt, is_long, content), node.block) == node.block

    def answer(self, request: Request) -> None:
        """Its logits were finite, if there are any."""
        if request.computed == len(request.tokens):
            vouch(request)

    def note_drops(self) -> None:
        self.kept = {key: one for key, one in self.kept.items() if one in self.pool._kept}

    @precondition(lambda self: any(r.computed == len(r.tokens) for r in self.running))
    @rule(data=st.data(), token=st.sampled_from([1, 1, 2, 3]))
    def append(self, data: st.DataObject, token: int) -> None:
        done = [r for r in self.running if r.computed == len(r.tokens)]
        request = data.draw(st.sampled_from(done))
        missing = self.pool.blocks_for(request.in_own_blocks + 1) - len(request.blocks)
        if missing > self.pool.free:
            return
        vouch(request)
        request.scored = request.prompt_len
        request.append(token)
        request.blocks.extend(self.pool.reserve(missing))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["finish", "cancel", "preempt", "poison"]))
    def leave(self, data: st.DataObject, how: str) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        if how == "finish":
            self.answer(request)
        if how == "poison":
            path = [node.block for node in request.path]
            self.cache.poison(request)
            assert not set(path) & self.pool._kept
        self.cache.release(request)
        if how == "preempt":
            request.computed = 0
            request.state = RequestState.QUEUED
            self.queued.append(request)
        else:
            self.cache.end(request)
        self.note_drops()

    @rule(name=st.sampled_from("aabci"), merges=st.booleans())
    def merge_or_unmerge(self, name: str, merges: bool) -> None:
        self.merge_count += 1
        self.merges[name].change(self.merge_count if merges else 0)

    @rule(name=st.sampled_from("abci"))
    def remove_adapter(self, name: str) -> None:
        """It comes back unmerged, with the same bytes; its requests are over before."""
        for request in [r for r in self.running if any(p.digest == name for p in r.pins)]:
            self.running.remove(request)
            self.cache.release(request)
            self.cache.end(request)
        self.queued = [r for r in self.queued if all(p.digest != name for p in r.pins)]
        self.merges[name] = MergeState()
        self.note_drops()

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        self.cache.check()
        assert self.cache.evictions == self.evicted
        assert set(self.kept.values()) == self.pool._kept
        held = {block for request in self.running for block in request.blocks}
        assert len(held) == self.pool.used

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for request in self.running:
            self.cache.release(request)
            self.cache.end(request)
        assert self.pool.used == 0
        self.pool.reserve(self.pool.num_blocks)
        assert not self.pool.kept
        assert not self.cache._tree._roots


TreeMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestWhatIsFoundIsWhatADictionaryHas = TreeMachine.TestCase


def test_a_root_is_gone_with_its_last_block() -> None:
    pool = BlockPool(2, 1)
    tree = PrefixTree(pool)
    one, two = pool.reserve(2)
    first = tree.add(Root(salt="s"), b"1", one)
    tree.add(first, b"2", two)
    assert tree.find(Root(), b"1") is None
    pool.release([two, one])
    pool.reserve(2)
    assert tree.evictions == 2
    tree.check()
    assert tree._roots == {}


@pytest.mark.parametrize("above", [True, False])
def test_a_dropped_block_takes_those_below_with_it(above: bool) -> None:
    pool = BlockPool(4, 1)
    tree = PrefixTree(pool)
    one, two, three = pool.reserve(3)
    first = tree.add(Root(), b"1", one)
    second = tree.add(first, b"2", two)
    third = tree.add(first, b"3", three)
    pool.release([three])
    tree.drop(first if above else second)
    assert (first.is_kept, second.is_kept, third.is_kept) == (not above, False, not above)
    assert tree.find(Root(), b"1") is (None if above else first)
    assert (pool.free, pool.kept) == (2, 0 if above else 2)
    tree.check()
    pool.check()
