"""An allocation that fails in a kernel of training is a MemoryError, and later calls work."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest
from loraplex_model.ops import products

# A process of its own, whose address space is limited. Each call needs far more scratch memory
# than the limit leaves, and in another place: in the caller or in the threads.
PROGRAM = """
import resource
import torch
from loraplex_model.ops import products

torch.set_num_threads(2)
starts = lambda *rows: torch.tensor(rows, dtype=torch.int32)

def draw(*shape):  # memory that is large is not touched
    made = torch.empty(shape, dtype=torch.bfloat16)
    return made.fill_(1) if made.numel() < 10000 else made

def attention(rows, back):
    how = products.Attending(starts(0, rows), 0, 0.1)
    q, k, v = (draw(rows, 1, 64) for _ in range(3))
    out, logs = draw(rows, 64), torch.zeros(1, rows)
    def call():
        if back:
            return products.attend_back(q, k, v, how, (out, logs), out)[0]
        return products.attend(q, k, v, how)[0]
    return call

def head(rows, width):
    weight, x, into = draw(64, width), draw(rows, width), draw(rows, 64)
    return lambda: products.head(weight, x, into) or into

def low_rank(width, rank, back):
    change = products.LowRank(torch.ones(rank, width), torch.ones(rank, 64), 0)
    rows = products.LowRankRows(0, draw(32, width), draw(32, rank), [change])
    def call():
        y = draw(32, 64)
        if back:
            return products.low_rank_gradients(y, [rows], [None], [False])[0][0][1]
        products.add_low_rank(y, [rows])
        return y
    return call

small = [attention(40, False), attention(40, True), head(40, 64)]
small += [low_rank(64, 16, False), low_rank(64, 16, True)]
large = [attention(1 << 20, False), attention(1 << 19, True), head(2048, 1 << 18)]
large += [low_rank(1 << 21, 2, False), low_rank(1 << 21, 2, True)]
wanted = [call() for call in small]
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for call in large:
    try:
        call()
    except MemoryError as error:
        print(error)
    else:
        raise SystemExit("the call had enough memory")
assert all(torch.equal(call(), want) for call, want in zip(small, wanted, strict=True))
"""


def test_a_failed_allocation_is_an_error_and_later_calls_work() -> None:
    if not products.available():
        pytest.skip("this processor has no instructions for bfloat16 products")
    done = subprocess.run(
        [sys.executable, "-c", dedent(PROGRAM)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = [line.split("`")[1] for line in done.stdout.splitlines()]
    assert names == ["attend", "attend_back", "head", "add_adapters", "adapters_back"]
