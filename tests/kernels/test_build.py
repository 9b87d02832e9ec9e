"""Where compiled kernels come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from loraplex_model.ops import build


def test_a_process_has_one_library_from_where_it_was_asked_for_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else a trainer, which is told where a server keeps its kernels, would compile them twice."""
    isa = build.supported_isas()[-1]
    there = build.find(isa) or build.compile_kernels(isa)
    asked = []

    def find(isa: str, flags: tuple[str, ...], directory: Path | None) -> Path:
        asked.append(directory)
        return there

    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "find", find)
    first = build.load(isa, (), tmp_path)
    assert build.load(isa) is first
    assert asked == [tmp_path]


def test_an_instruction_set_that_the_processor_lacks_is_refused() -> None:
    with pytest.raises(build.KernelsUnavailable, match="it runs"):
        build.load("sparc")
