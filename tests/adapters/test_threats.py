"""Hostile adapters: the server reads two files, within bounds, and does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE, base_info, lora_config, write_adapter
from adapters.kind_files import SAMPLES
from loraplex_adapters.format.examine import examine
from loraplex_adapters.format.kinds import KINDS

AUDITED = """
import sys
from pathlib import Path
from adapters.adapter_files import BASE
from loraplex_adapters.format.examine import examine
roots = [Path(argument) for argument in sys.argv[1:]]
for root in roots:
    examine(root, BASE)  # what is imported late is imported now
seen = []
watching = True
HARMLESS = {"os.scandir", "os.listdir", "object.__getattr__", "sys._getframe", "marshal.loads"}
def hook(event, arguments):
    if watching and event not in HARMLESS:
        seen.append((event, str(arguments[0]) if arguments else ""))
sys.addaudithook(hook)
for root in roots:
    examine(root, BASE)
watching = False
for event, first in seen:
    print(event, first)
"""

ALLOWED = {"adapter_config.json", "adapter_model.safetensors"}


def test_examining_an_adapter_opens_its_two_files_and_nothing_else(tmp_path: Path) -> None:
    sources = []
    for name, (config, tensors) in SAMPLES.items():
        source = write_adapter(tmp_path / name, config, tensors)
        for trap in ("adapter_model.bin", "tokenizer_config.json", "chat_template.jinja", "x.py"):
            (source / trap).write_bytes(b"\x80\x04")
        sources.append(source)
    config = {**lora_config(), "auto_mapping": {"parent_library": "os", "base_model_class": "x"}}
    config["base_model_name_or_path"] = "https://127.0.0.1:9/model"
    sources.append(write_adapter(tmp_path / "remote", config))
    ran = subprocess.run(
        [sys.executable, "-c", AUDITED, *map(str, sources)],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/nowhere"},
    )
    seen = [line.partition(" ") for line in ran.stdout.splitlines()]
    assert {event for event, _, _ in seen} == {"open"}
    opened = [first for _, _, first in seen]
    assert {Path(p).name for p in opened if p not in map(str, sources)} == ALLOWED
    assert len(opened) == 3 * len(sources)  # the directory and its two files


HOSTILE = [r"(.*a){30}", "(a+)+$", r"((((.*)*)*)*)*x", "(?:q|q)*_proj", "[" * 40, "a" * 5000]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_in_a_file_is_compiled_as_an_expression(
    kind: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = next(s for s in SAMPLES.values() if s[0]["peft_type"] == kind)
    texts: dict[str, Any] = dict.fromkeys(KINDS[kind].options, pattern)
    maps: dict[str, Any] = {key: {pattern: 1} for key in KINDS[kind].options}
    lists: dict[str, Any] = {key: [pattern] for key in KINDS[kind].options}
    sources = [
        write_adapter(tmp_path / str(n), {**config, **changes}, tensors)
        for n, changes in enumerate((texts, maps, lists))
    ]

    def refuse(*_: object) -> None:
        raise AssertionError("an expression was compiled")

    monkeypatch.setattr("re._compile", refuse)
    monkeypatch.setattr("re._compiler.compile", refuse)
    for source in sources:
        assert examine(source, BASE).findings


def calls_of(run: Callable[[], object]) -> int:
    """Counts function calls, a measure of work without a clock."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def full(entry: Callable[[int], str]) -> list[str]:
    """Many names, a tenth of what fits into a configuration."""
    names = [entry(n) for n in range(20_000)]
    while len(json.dumps(names)) > 60_000:
        names = names[: len(names) * 9 // 10]
    return names


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": full(lambda n: f"a{n}")},
        {"exclude_modules": full(lambda n: f"a{n}")},
        {"modules_to_save": full(lambda n: f"a{n}")},
        {"rank_pattern": dict.fromkeys(full(lambda n: f"a{n}"), 1)},
        {"rank_pattern": dict.fromkeys(full(lambda n: f"a.b{n}"), 1)},
        {"alpha_pattern": dict.fromkeys(full(lambda n: f"self.attn.q_pro{n % 10}.{n}"), 1)},
        {"rank_pattern": dict.fromkeys(full(lambda n: f".*b{n}"), 1)},
        {"alpha_pattern": {f"(.*x|.)*{n}" + ".?" * 1000: 1 for n in range(200)}},
        {"target_modules": "(.*x|.)*" + ".?" * 1000},
        {"exclude_modules": "(?!(.*x|.)*y).*" * 200},
        {"trainable_token_indices": list(range(10_000))},
        {"layers_to_transform": list(range(10_000))},
        {f"loraplex_{n}": "x" for n in range(3_000)},
        {f"new_{n}": 1 for n in range(4_000)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_work_is_bounded_on_a_deep_base(changes: dict[str, Any], tmp_path: Path) -> None:
    deep = base_info(num_layers=100)
    source = write_adapter(tmp_path, lora_config(**changes))
    assert calls_of(lambda: examine(source, deep)) < 500_000
