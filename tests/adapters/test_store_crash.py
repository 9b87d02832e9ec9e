"""kill -9 anywhere in a registration: what was acknowledged stays, what was not leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapters.adapter_files import BASE_JSON, everywhere, lora_tensors, write_adapter

CRASHES = """
import json, os, shutil, signal, sys
from pathlib import Path
import msgspec
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Refusal
from loraplex_adapters.store import Store
from loraplex_adapters.store.files import blobs

top, base = Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=BaseInfo)
blobs._PIECE = 512  # several deaths within one file
HERE = ("loraplex_adapters/store/", "sqlalchemy/engine/default.py")

def traced(count_to):
    seen = 0
    def line(frame, event, arg):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == count_to:
                os.kill(os.getpid(), signal.SIGKILL)
        return line
    def call(frame, event, arg):
        return line if any(h in frame.f_code.co_filename for h in HERE) else None
    sys.settrace(call)
    return lambda: seen

def replace(root, count_to):
    count = traced(count_to)
    with Store(root) as store:
        store.register("victim", top / "new", base, replace=True)
    sys.settrace(None)
    return count()

with Store(top / "template") as store:
    kept = store.register("kept", top / "kept", base)[0]
    old = store.register("victim", top / "old", base)[0]

shutil.copytree(top / "template", top / "dry")
total = replace(top / "dry", 0)
outcomes = {"old": 0, "new": 0}
points = {*range(1, total + 1, max(1, total // 50)), *range(total - 60, total + 1, 2)}
for point in sorted(points):
    root = top / "run"
    shutil.copytree(top / "template", root)
    child = os.fork()
    if child == 0:
        replace(root, point)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), point
    with Store(root) as store:
        assert store.resolve("kept") == kept, point
        assert store.resolve("victim@1") == old, point
        current = store.resolve("victim")
        outcomes["old" if current == old else "new"] += 1
        for record in (kept, old, current):
            store.verify(record.digest)
        assert len(list((root / "staging").iterdir())) == 1, point
        again, created = store.register("victim", top / "new", base, replace=True)
        assert (again.version, created) == (2, current == old), point
        store.verify(again.digest)
    shutil.rmtree(root)
print(json.dumps({"points": total, **outcomes}))
"""

RACER = """
import json, sys
from pathlib import Path
import msgspec
from loraplex_model.base.info import BaseInfo
from loraplex_adapters.store import Store
top, base = Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=BaseInfo)
sys.stdin.readline()
made = []
with Store(top / "store") as store:
    for n in range(25):
        source = top / ("old" if n % 2 else "new")
        record, created = store.register("shared", source, base, replace=True)
        if created:
            made.append(record.version)
        store.register(f"{sys.argv[3]}-{n}", source, base)
        store.verify(record.digest)
assert "torch" not in sys.modules
print(json.dumps(made))
"""

AUDIT = """
import json, os, sys
from pathlib import Path
import msgspec
from loraplex_adapters.format.files import open_below
from loraplex_model.base.info import BaseInfo
from loraplex_adapters.store import Store

top, base = Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=BaseInfo)

def register(store_root):
    with Store(store_root) as store, open_below(top, "kept") as source:
        store.register("a", source, base)
        store.resolve("a")

register(top / "warm-up")  # imports and caches of the interpreter
seen = []
watched = ("open", "os.rename", "os.mkdir", "sqlite3.connect", "os.remove", "os.rmdir", "os.chmod",
           "os.symlink", "os.link", "socket.connect", "subprocess.Popen", "os.exec", "import")
def watch(event, args):
    if event in watched:
        seen.append((event, args[0] if isinstance(args[0], str) else os.fsdecode(args[0])
                     if isinstance(args[0], (bytes, os.PathLike)) else repr(args[0])))
sys.addaudithook(watch)
register(top / "store")
events = list(seen)
print(json.dumps(events))
"""


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if possible; writes of a killed process are not lost there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def prepare(top: Path) -> list[str]:
    for seed, name in enumerate(("kept", "old", "new")):
        write_adapter(top / name, weights=lora_tensors(everywhere("q_proj", "v_proj"), seed=seed))
    return [str(top), BASE_JSON]


def run(script: str, *arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_kill_9_at_any_line_keeps_what_was_acknowledged(ram: Path) -> None:
    outcome = json.loads(run(CRASHES, *prepare(ram)))
    assert outcome["points"] > 300
    assert outcome["old"] > 30, "deaths before the commit"
    assert outcome["new"] > 3, "deaths after it"


def test_two_processes_register_at_once_without_losing_or_sharing_a_version(ram: Path) -> None:
    arguments = prepare(ram)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, *arguments, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    made: list[int] = []
    for racer in racers:
        out, error = racer.communicate(timeout=120)
        assert racer.returncode == 0, error
        made += json.loads(out)
    assert sorted(made) == list(range(1, len(made) + 1))

    from loraplex_adapters.store import Store

    with Store(ram / "store") as store:
        assert store.get("shared").version == len(made)
        assert len(store.page(1000).records) == 51
        assert len(list((ram / "store" / "blobs" / "sha256").iterdir())) == 2


def test_a_registration_touches_nothing_but_the_store_and_the_source(tmp_path: Path) -> None:
    events = json.loads(run(AUDIT, *prepare(tmp_path)))
    # relative to a directory that is open
    relative = {"kept", "owner", "adapter_config.json", "adapter_model.safetensors"}
    allowed = (str(tmp_path / "store"), str(tmp_path / "kept"))
    strangers = [
        (event, path)
        for event, path in events
        if not (path in {*relative, str(tmp_path)} or path.startswith(allowed) or path.isdigit())
    ]
    assert not strangers
    assert {event for event, _ in events} >= {"open", "os.rename", "sqlite3.connect"}
