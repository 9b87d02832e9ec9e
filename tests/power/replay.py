"""Lets power fail at every recorded moment, and opens what may be left."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from power.disk import Moment, Tree

PER_MOMENT = 24
"""Trees that are made of one moment, if there are more."""


def replay(
    moments: Sequence[Moment],
    check: Callable[[Path, frozenset[str]], None],
    *,
    at_most: int | None = None,
    seed: int | None = None,
) -> int:
    """Calls `check` with a folder for every state that a loss of power may leave.

    The folder's content may be changed; the second argument is what had been acknowledged.
    `at_most` states are drawn by the seed from all different ones. Returns how many there were.
    The exception of a failed check says at which moment power failed, and what was left.
    """
    seed = random.randrange(1 << 32) if seed is None else seed
    choice = random.Random(seed)
    states: dict[bytes, tuple[Moment, Tree]] = {}
    for moment in moments:
        for tree in moment.trees(choice, PER_MOMENT):
            states[_key(tree)] = (moment, tree)  # the last moment has acknowledged the most
    drawn = list(states.values())
    if at_most is not None and len(drawn) > at_most:
        drawn = choice.sample(drawn, at_most)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for number, (moment, tree) in enumerate(drawn):
            root = Path(folder) / str(number)
            write(tree, root)
            try:
                check(root, moment.acknowledged)
            except BaseException as error:
                error.add_note(f"seed {seed}, power failed {moment.where} ({_lost(moment, tree)})")
                raise
            shutil.rmtree(root)
    return len(drawn)


def write(tree: Tree, root: Path) -> None:
    """Writes a tree into the new folder `root`."""
    root.mkdir()
    for path, node in tree.items():
        if node.is_directory:
            (root / path).mkdir(mode=node.mode & 0o777)
        else:
            (root / path).write_bytes(node.seen)
            (root / path).chmod(node.mode & 0o777)


def _key(tree: Tree) -> bytes:
    digest = hashlib.sha256()
    for path, node in sorted(tree.items()):
        digest.update(f"{path}\0{node.is_directory}{len(node.seen)}\0".encode() + node.seen)
    return digest.digest()


def _lost(moment: Moment, tree: Tree) -> str:
    whole = moment.everything()
    lost = [f"without {path}" for path in whole if path not in tree]
    lost += [f"still {path}" for path in tree if path not in whole]
    lost += [f"other bytes in {p}" for p in tree if p in whole and tree[p].seen != whole[p].seen]
    return ", ".join(lost) or "nothing lost"
