"""Kills processes that change a store by SIGKILL, at every fault point, and checks the result.

    python tests/adapters/store_kills.py FOLDER KILLS

FOLDER must not exist. Fails with a traceback that names the point and the seed if anything that was
acknowledged is lost. The last line of output is one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from loraplex_model.base import faults

from adapters import store_workload as workload


def run(top: Path, wanted: int) -> dict[str, object]:
    """Kills `wanted` processes: one at each point, on a random visit, then at random points."""
    workload.prepare(top)
    reached: list[str] = []
    shutil.copytree(top / "template", top / "dry")
    with faults.injected(reached.append):
        workload.live(top / "dry", top, lambda step: None)
    seed = random.randrange(1 << 32)
    choice = random.Random(seed)
    numbers = [
        choice.choice([n for n, p in enumerate(reached, 1) if p == point])
        for point in sorted(set(reached))
    ]
    rest = [n for n in range(1, len(reached) + 1) if n not in numbers]
    numbers += [choice.choice(rest) for _ in range(wanted - len(numbers))]
    for number in numbers:
        where = f"seed {seed}, {reached[number - 1]}, point {number} of {len(reached)}"
        _kill(top, number, where)
    killed = sorted({reached[number - 1] for number in numbers})
    return {"kills": len(numbers), "lost": 0, "points": killed}


def _kill(top: Path, number: int, where: str) -> None:
    root = top / "run"
    shutil.copytree(top / "template", root)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with faults.injected(_killer(number)):
            workload.live(root, top, lambda step: os.write(writing, f"{step}\n".encode()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        acknowledged = set(pipe.read().split())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), where
    try:
        workload.check(root, top, acknowledged)
    except BaseException as error:
        error.add_note(where)
        raise
    shutil.rmtree(root)


def _killer(number: int) -> Callable[[str], None]:
    hits = 0

    def count(point: str) -> None:
        nonlocal hits
        hits += 1
        if hits == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    print(json.dumps(run(folder, int(sys.argv[2]))))
