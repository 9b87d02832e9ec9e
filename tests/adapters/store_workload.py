"""A short program that changes a store in many ways, and the promises that must hold after it.

Tests let it fail at every fault point, by an exception and by SIGKILL.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import loraplex_adapters.store
from adapters.adapter_files import BASE
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Refusal

from adapters import stores


def points() -> list[str]:
    """Every fault point in the store's source, once for each place."""
    found = []
    for file in sorted(Path(loraplex_adapters.store.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("reach"):
                (name,) = node.args
                found.append(ast.literal_eval(name))
    return [name for name in found if name.startswith("store.")]


def prepare(top: Path) -> None:
    """Writes the adapters, and a store that has been changed before in `top`/template/old."""
    one, two, three, four, five, six, _ = stores.adapters(top, 7)
    with Store(top / "template" / "old") as store:
        store.register("kept", one, BASE)
        store.register("kept", two, BASE, replace=True)
        store.set_alias("stable", "kept@1")
        store.register("victim", one, BASE)
        store.set_alias("prod", "victim@1")
        store.register("gone", three, BASE)
        store.delete("gone")
        store.register("back", four, BASE)
        store.delete("back")
        store.uploads.append(store.uploads.begin(), CONFIG_FILE, 0, b"{")
        damaged = store.register("bad", five, BASE)[0].digest
        (store.path(damaged) / CONFIG_FILE).unlink()
        # What a collector leaves that loses its connection between rename and commit.
        store._blobs.discard(store.register("lost", six, BASE)[0].digest)


def live(root: Path, top: Path, acknowledge: Callable[[str], None]) -> None:
    """Runs the program; acknowledges each step by its name once it has returned."""
    with Store(root / "new") as store:
        store.register("first", top / "source-0", BASE)
        acknowledge("began")
    with Store(root / "old") as store:
        store.register("victim", top / "source-1", BASE, replace=True, labels={"step": "1"})
        acknowledge("replaced")
        store.set_alias("prod", "victim@2", "victim@1")
        acknowledge("moved")
        store.register("bad", top / "source-4", BASE)
        acknowledge("mended")
        store.restore("back")
        acknowledge("restored")
        upload = store.uploads.begin()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            data = (top / "source-6" / file).read_bytes()
            half = len(data) // 2
            store.uploads.append(
                upload, file, store.uploads.append(upload, file, 0, data[:half]), data[half:]
            )
        digest = inspect(top / "source-6", BASE).digest
        store.finish_upload(upload, "sent", digest, BASE)
        acknowledge("sent")
        store.label("kept", {"checked": "yes"})
        acknowledge("labelled")
        store.gc(0)
        acknowledge("collected")


def check(root: Path, top: Path, acknowledged: set[str]) -> None:
    """Checks the promises on stores that are opened after the program ended at any point."""
    with Store(root / "new") as store:
        if "began" in acknowledged:
            store.verify(store.resolve("first@1").digest)
        assert store.register("first", top / "source-0", BASE)[0].version == 1
    with Store(root / "old") as store:
        _check_what_was_acknowledged(store, acknowledged)
        _check_that_all_can_be_done_again(store, root / "old", top)
    for name in ("new", "old"):
        assert not list((root / name / "staging").iterdir())


def _check_what_was_acknowledged(store: Store, acknowledged: set[str]) -> None:
    assert store.resolve("kept").version == 2
    assert store.resolve("stable").id == "kept@1"
    assert store.resolve("lost").version == 1
    victim, prod = store.resolve("victim"), store.resolve("prod")
    assert victim.version in ((2,) if "replaced" in acknowledged else (1, 2))
    assert victim.version == 1 or victim.labels == {"step": "1"}
    assert prod.id in (("victim@2",) if "moved" in acknowledged else ("victim@1", "victim@2"))
    if "labelled" in acknowledged:
        assert store.resolve("kept").labels == {"checked": "yes"}
    for name, step in (("back", "restored"), ("sent", "sent")):
        try:
            assert store.resolve(name).version == 1
        except Refusal:
            assert step not in acknowledged, name
    damaged = [verified.versions for verified in store.verify_all() if verified.error is not None]
    assert damaged in ([[]] if "mended" in acknowledged else [[], [("bad@1",)]])


def _check_that_all_can_be_done_again(store: Store, root: Path, top: Path) -> None:
    with suppress(Refusal):
        store.restore("back")
    store.register("victim", top / "source-1", BASE, replace=True, labels={"step": "1"})
    assert store.resolve("victim").version == 2
    assert store.register("bad", top / "source-4", BASE)[0].version == 1
    store.gc(0)
    assert stores.blobs(root) == {verified.digest for verified in store.verify_all()}
    assert all(verified.error is None for verified in store.verify_all())
    assert {alias.alias for alias in store.aliases()} == {"stable", "prod"}
    for folder in (root / "uploads").iterdir():
        if folder.is_dir():
            store.uploads.state(folder.name)  # it could go on
            store.uploads.abort(folder.name)
    assert not stores.rubbish(root)
    assert store.register("gone", top / "source-2", BASE)[0].version == 2
