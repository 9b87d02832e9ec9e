"""The prefix cache: keys and values that requests which begin alike compute once.

Every full block of a request is kept as soon as it is computed, prompt and answer alike, below the
root of all that it depends on (`Root`). A later request uses the blocks that it finds and computes
the rest, at least one token. Blocks of requests that have ended or were preempted stay until their
memory is needed.

    base      | t t t t | t t t t | t t             the root of the base
    aLoRA i   | t t t t | t t i i | i t t t |       the base's first block, then its own below that
    LoRA a    | t t t t | t t t t |                 the root of adapter a

A request does not compute what an earlier one is about to keep: it waits for that block, takes it,
and computes what is left. Who waits for whom follows from one pass over the running requests, in
their order and again in each step; a request never waits for a later one, so none waits for ever,
whoever is cancelled or preempted meanwhile.

What a request has kept is trusted once logits computed from it were finite. If a request ends
before that, its blocks are dropped; if its logits are not finite, so are those that it had found.
"""

from __future__ import annotations

from collections.abc import Hashable

from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.prefix_tree import KeptBlock, PrefixTree, Root
from loraplex_server.engine.batching.request import Request


class PrefixCache:
    """What requests have kept in a pool, and what each of them holds of it.

    Attributes:
        lookups: number of admissions of requests that may use kept blocks.
        hits: number of these that used some.
    """

    def __init__(self, pool: BlockPool, enabled: bool = True) -> None:
        self._pool = pool
        self._tree = PrefixTree(pool)
        self._enabled = enabled
        self.lookups = 0
        self.hits = 0

    @property
    def evictions(self) -> int:
        """Number of kept blocks that were reserved for other content."""
        return self._tree.evictions

    def find(self, request: Request) -> list[KeptBlock]:
        """Kept blocks that hold the beginning of a queued request, in order.

        Nothing is found for a request that needs every token computed, for log-probabilities of its
        prompt or for the mean of its states. What was found is remembered, so asking again costs
        little.
        """
        if not self._enabled:
            return request.found
        root, found = _root(request), request.found
        if request.wants_all or root != request.root:
            self.end(request)
            request.root = root
            found.clear()
        if request.wants_all:
            return found
        size = len(request.tokens)
        while found and (not found[-1].is_kept or self._end(request, len(found)) >= size):
            self._drop_unsound(found.pop())
        while node := self._next(request, found):
            found.append(node)
        return found

    def kept(self, request: Request) -> int:
        """Number of first tokens of a queued request in what `find` finds. Nothing is noted."""
        if not self._enabled or request.wants_all:
            return 0
        at = 0
        node: KeptBlock | Root = _root(request)
        while self._end(request, at + 1) < len(request.tokens):
            below = self._tree.find(node, self._edge(request, at))
            if below is None:
                break
            at, node = at + 1, below
        return self._end(request, at)

    def begin(self, request: Request) -> None:
        """Lets a request that starts own the blocks found for it, from which it continues."""
        if not self._enabled:
            return
        request.root = _root(request)
        request.merges_seen = request.copies.changes
        self.lookups += not request.wants_all
        self.hits += bool(request.found)
        request.path, request.found = request.found, []
        for node in request.path:
            self._pool.share(node.block)
            request.blocks.append(node.block)
        request.computed = self._end(request, len(request.path))

    def awaits(self, request: Request, coming: set[tuple[KeptBlock | Root, Hashable]]) -> bool:
        """Whether a running request should wait for a block that an earlier one is computing.

        It first takes the blocks that were kept since. `coming` has the blocks that the earlier
        requests of this step are computing; those of `request` are added.
        """
        if not self._keeps(request):
            return False
        self._catch_up(request)
        at = len(request.path)
        if self._end(request, at + 1) > len(request.tokens) - request.pending:
            return False
        block = _deepest(request), self._edge(request, at)
        may_wait = not request.wants_all and request.computed == self._end(request, at)
        if may_wait and request.remaining > 1 and block in coming:
            return self._end(request, at + 1) < len(request.tokens)
        if not request.wants_all:
            coming.add(block)
        return False

    def keep(self, request: Request, computed: int) -> None:
        """Keeps the full blocks among the first `computed` tokens of a running request.

        If the same content was kept meanwhile, the request takes that block in place of its own.
        """
        while self._keeps(request) and self._end(request, len(request.path) + 1) <= computed:
            at = len(request.path)
            parent, edge = _deepest(request), self._edge(request, at)
            node = self._tree.find(parent, edge)
            if node is None:
                node = self._tree.add(parent, edge, request.blocks[at])
            elif node.block != request.blocks[at]:
                self._replace(request, at, node)
            request.path.append(node)

    def release(self, request: Request) -> None:
        """Frees a request's blocks, which it may find again."""
        self._pool.release(reversed(request.blocks))
        del request.blocks[:]
        request.path, request.found = [], request.path

    def end(self, request: Request) -> None:
        """Drops what a request has used that nobody vouches for. It has no blocks any more."""
        for node in reversed(request.found):
            if node.is_sound:
                break
            self._drop_unsound(node)

    def poison(self, request: Request) -> None:
        """Drops everything that a request with wrong numbers holds, and all that follows it."""
        for node in (*request.path, *request.found):
            if node.is_kept:
                self._tree.drop(node)

    def check(self) -> None:
        """Verifies trees and pool. Raises `AssertionError`."""
        self._tree.check()

    def _drop_unsound(self, node: KeptBlock) -> None:
        """Drops a block that no request vouches for and none can any more."""
        if node.is_kept and not node.is_sound and not self._pool.owners(node.block):
            self._tree.drop(node)

    def _catch_up(self, request: Request) -> None:
        """Takes kept blocks in place of own ones that are still empty."""
        if request.wants_all:
            return
        while request.computed == self._end(request, len(request.path)):
            node = self._next(request, request.path)
            if node is None:
                return
            self._replace(request, len(request.path), node)
            self.hits += not request.path
            request.path.append(node)
            request.computed = self._end(request, len(request.path))
            if request.runs == 1:
                request.cached = request.computed

    def _replace(self, request: Request, at: int, node: KeptBlock) -> None:
        """Puts a kept block in place of the request's own block `at`, which nobody else owns."""
        self._pool.share(node.block)
        self._pool.release([request.blocks[at]])
        request.blocks[at] = node.block

    def _keeps(self, request: Request) -> bool:
        """Whether the next blocks of a running request belong below its last one."""
        if not self._enabled or request.merges_seen != request.copies.changes:
            return False
        return not request.path or request.path[-1].is_kept

    def _next(self, request: Request, path: list[KeptBlock]) -> KeptBlock | None:
        """The kept block that follows `path`, the first blocks of a request."""
        at = len(path)
        # A token is left to compute, and those that are not on the host yet are not compared.
        if self._end(request, at + 1) >= len(request.tokens):
            return None
        assert request.root is not None, "a request without a root looks for blocks"
        return self._tree.find(path[-1] if path else request.root, self._edge(request, at))

    def _end(self, request: Request, blocks: int) -> int:
        """Number of the request's tokens in its first `blocks` blocks."""
        return max(0, blocks * self._pool.block_size - request.prefix.rest)

    def _edge(self, request: Request, at: int) -> Hashable:
        """The edge to the request's block `at`, which is full.

        In a block with tokens of an activated LoRA it also says from where on the adapter acts, and
        how, since the blocks before it may be the base's.
        """
        end = self._end(request, at + 1)
        tokens = request.tokens[self._end(request, at) : end]
        assert min(tokens) >= 0, "tokens are compared that are not on the host yet"
        if 0 < request.active_from < end and request.mix:
            return _adapters(request), _merge(request), request.active_from, tokens.tobytes()
        return tokens.tobytes()


def vouch(request: Request) -> None:
    """Notes that logits computed from everything that a request holds were finite."""
    for node in reversed(request.path):
        if node.is_sound:
            return
        node.is_sound = True


def _deepest(request: Request) -> KeptBlock | Root:
    """The last of the request's blocks that is kept, or its root."""
    assert request.root is not None, "a running request has no root"
    return request.path[-1] if request.path else request.root


def _root(request: Request) -> Root:
    """The root of a request: that of the base if the base computes its first token."""
    salt = request.submit.cache_salt
    if not request.mix or request.active_from:
        return Root(is_long=request.is_long, salt=salt)
    return Root(_adapters(request), _merge(request), request.is_long, salt)


def _adapters(request: Request) -> tuple[tuple[str, str], ...]:
    """Digests and exact weights of the request's adapters, in the order of their sum."""
    pins = zip(request.pins, request.mix, strict=True)
    return tuple((pin.digest, float(weight).hex()) for pin, (_, weight) in pins)


def _merge(request: Request) -> int:
    """Number of the merge that computes the request's rows; 0 if none does."""
    return request.copies.merge if request.sole_adapter else 0
