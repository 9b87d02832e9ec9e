"""The committed corpus and a few hundred mutations of it hold what `fuzz.targets` promises.

`make fuzz` runs the same targets for a minute.
"""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.mutate import mutate
from fuzz.seed import CORPUS, inputs
from fuzz.targets import TARGETS

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())
MUTATIONS = 16
CALLS = 400_000
"""More calls than any input may cost; a sound adapter costs some 3,000."""
MEMORY = 16 << 20


def cost(run: Callable[[bytes], None], data: bytes) -> tuple[int, int]:
    """How many functions a run called, and how many bytes it had at most. Deterministic."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        run(data)
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return calls, peak


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some of: bytes changed, cut, doubled, or words of JSON put in."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        length = chance.choice((1, 1, 2, 8, 40))
        piece = chance.choice(
            (
                chance.randbytes(length),
                b"",
                bytes(changed[at : at + length]) * 2,
                chance.choice(
                    (b"-1", b"1e308", b"null", b"true", b"[]", b"{}", b'""', b"99999999")
                ),
            )
        )
        changed[at : at + chance.choice((0, length))] = piece
    return bytes(changed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_corpus_and_its_mutations_raise_nothing_and_cost_little(path: Path) -> None:
    run = TARGETS[path.parent.name]
    data = path.read_bytes()
    chance = random.Random(path.name)
    for number in range(1 + MUTATIONS):
        case = data
        if number:
            whole = path.parent.name == "adapter" and number % 2
            case = mutate(data, chance) if whole else mutated(data, chance)
        calls, peak = cost(run, case)
        assert calls < CALLS, (number, case)
        assert peak < MEMORY, (number, case)


def test_the_corpus_is_what_its_script_writes() -> None:
    assert FILES, "the corpus is empty"
    for path, data in inputs().items():
        assert path.read_bytes() == data, f"run tests/fuzz/seed.py: {path.name} differs"
