"""Fuzzes one target with atheris (libFuzzer), from the corpus on.

    PYTHONPATH=tests python tests/fuzz/run.py config|header|adapter [seconds]

New inputs go to var/fuzz/<target>; what fails is written there as crash-, timeout- or oom-<hash>.
An input that takes more than 2 seconds or 512 MB is a failure.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["loraplex_adapters"]):
    import loraplex_adapters.format.examine  # noqa: F401

from fuzz.mutate import mutate
from fuzz.targets import TARGETS
from loraplex_adapters.format.kinds import KINDS
from loraplex_adapters.format.support import COMMON

CORPUS = Path(__file__).with_name("corpus")


def words() -> list[str]:
    """What a mutation should know: keys, kinds, endings of tensors' names, and odd numbers."""
    keys = {key for kind in KINDS.values() for key in kind.options} | set(COMMON)
    endings = {f".{ending}" for kind in KINDS.values() for ending in kind.endings}
    others = {"F32", "F16", "BF16", "data_offsets", "shape", "dtype", "__metadata__", "model."}
    others |= {"-1", "1e308", "9007199254740993", "true", "null", "[]", "{}", "\\\\ud800"}
    return sorted(keys | endings | set(KINDS) | others)


def main() -> None:
    target, seconds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
    found = Path("var/fuzz") / target
    found.mkdir(parents=True, exist_ok=True)
    dictionary = found.parent / "words"
    dictionary.write_text("".join(f'"{word}"\n' for word in words()))
    arguments = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        "-timeout=2",
        "-rss_limit_mb=512",
        "-max_len=50000",
        f"-dict={dictionary}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
        "-verbosity=1",
        str(found),
        str(CORPUS / target),
    ]
    if target == "adapter":
        atheris.Setup(arguments, TARGETS[target], custom_mutator=mutate_adapter)
    else:
        atheris.Setup(arguments, TARGETS[target])
    atheris.Fuzz()


def mutate_adapter(data: bytes, max_size: int, seed: int) -> bytes:
    """Half the time libFuzzer's own mutation of the bytes, half the time one that adds up."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    return mutate(data, chance)[:max_size]


def in_fresh_process() -> None:
    """Goes on in a child process; the parent ends with the child's exit code.

    libFuzzer compares the peak memory of the process with its limit. Linux counts the memory of a
    large process that starts this one, such as pytest, towards that peak, but not towards that of a
    forked child.
    """
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    in_fresh_process()
    main()
