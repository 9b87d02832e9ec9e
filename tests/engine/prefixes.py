"""Requests that share the beginning of their prompts, asked of an engine and checked.

The oracle's blocks hold 4 tokens.
"""

from __future__ import annotations

import json
from typing import Any

from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation, invoked_at
from loraplex_server.engine.messages import AdapterRef, Merge, Unload, Unmerge

HEAD = list(range(20, 31))  # 11 tokens: two full blocks
INVOCATION = [7, 8]


def engine_with(num_blocks: int = 40, **limits: int) -> Engine:
    runner = OracleRunner(num_blocks=num_blocks, merge_budget_bytes=100, prefix_blocks=4)
    return Engine(runner, **limits)


def alora(name: str, weight: float = 1.0, **options: Any) -> AdapterRef:
    return adapter(name, weight, invocation=INVOCATION, **options)


def ask(
    engine: Engine, id: int, prompt: list[int], *refs: AdapterRef, new: int = 3, salt: str = ""
) -> int:
    """Answers a request, which must be right; returns how many of its tokens were found."""
    before = len(engine.runner.batches)
    engine.submit(id, prompt, new, adapters=list(refs), cache_salt=salt)
    engine.run()
    assert engine.tokens(id) == expected(prompt, list(refs), new)
    engine.core.check()
    computed = sum(len(batch.tokens) for batch in engine.runner.batches[before:])
    found = engine.outputs[id][0].cached_tokens
    assert len(prompt) + new - 1 - computed == found
    return found


def expected(prompt: list[int], refs: list[AdapterRef], new: int) -> list[int]:
    options = json.loads(refs[0].path) if refs else {}
    active = invoked_at(prompt, options["invocation"]) if "invocation" in options else 0
    mix = [(ref.digest, ref.weight) for ref in refs]
    return continuation(prompt, mix, new, virtual=options.get("virtual", 0), active=active)


def order(engine: Engine, message: Merge | Unload | Unmerge, steps: int = 0) -> None:
    """Gives an order and lets the engine rest, or after `steps` go on."""
    engine.core.control(message)
    if not steps:
        engine.run()
        return
    for _ in range(steps):
        while engine.loader.jobs:
            engine.loader.finish()
        engine.step()
