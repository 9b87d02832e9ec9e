"""Where to publish adapters: checked before a run, kept in its directory. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from loraplex_adapters.store import Store
from loraplex_adapters.store.index.ids import check_name
from loraplex_adapters.store.index.labels import check_labels
from loraplex_model.base.durable import flush, write_atomically
from loraplex_model.base.refusal import Reason, Refusal

TARGET: Final = "target.json"
SAVED: Final = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Target:
    """The store and the server that trained adapters are published to.

    Attributes:
        store: directory of the store, or None.
        store_url: URL of a shared store's database, or "".
        alias: alias that points to the adapter in the store and on the server, or "".
        labels: labels of the registered version.
        server: host:port of a server to upload to, or "".
        dtype: dtype of the saved tensors: "float32" or "bfloat16".
    """

    store: Path | None = None
    store_url: str = ""
    alias: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    server: str = ""
    dtype: str = "float32"


def read(
    store: Path | None,
    store_url: str,
    alias: str,
    labels: Mapping[str, str],
    server: str,
    dtype: str,
) -> Target:
    """Checks and returns where to publish. Raises Refusal(CONFIG_INVALID) with every problem."""
    problems = []
    try:
        if alias:
            check_name(alias)
    except Refusal as error:
        problems.append(f"--alias {alias}: {error.message}")
    try:
        check_labels(labels)
    except Refusal as error:
        problems.append(f"--label: {error.message}")
    if dtype not in SAVED:
        problems.append(f"--save-dtype is {dtype!r}; it should be one of {', '.join(SAVED)}")
    if alias and store is None and not server:
        problems.append("--alias needs --store or --serve, where it points to the adapter")
    if store is not None and not problems:
        try:
            Store(store, store_url).close()
        except Refusal as error:
            problems.append(f"--store {store}: {error.message}")
    if problems:
        raise Refusal.listing(Reason.CONFIG_INVALID, problems)
    return Target(store.absolute() if store else None, store_url, alias, labels, server, dtype)


def keep(target: Target, out: Path) -> None:
    """Writes the target into the run's directory, for `resume`; without the database's URL."""
    values = asdict(target)
    del values["store_url"]
    with suppress(OSError):
        text = json.dumps(values, indent=2, default=str) + "\n"
        write_atomically(out / TARGET, text.encode())
        flush(out)


def kept(out: Path) -> Target:
    """Returns the target that `keep` wrote, or an empty one if it cannot be read."""
    try:
        values = json.loads((out / TARGET).read_text("utf-8"))
    except (OSError, ValueError):
        return Target()
    store = values.pop("store")
    url = os.environ.get("LORAPLEX_STORE_URL", "")
    return Target(**values, store=Path(store) if store else None, store_url=url)
