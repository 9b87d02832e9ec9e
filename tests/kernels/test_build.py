"""Where compiled kernels come from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from loraplex_model.base.refusal import Refusal
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


@pytest.mark.parametrize("asked", ["avx9", "AVX2", "avx512"])
def test_a_variable_that_names_no_instruction_set_of_the_processor_is_refused(
    asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setenv("LORAPLEX_ISA", asked)
    for call in (build.chosen_isa, partial(build.load, directory=tmp_path)):
        with pytest.raises(Refusal, match=r"can run \(avx2, portable\), or unset it") as caught:
            call()
        assert caught.value.reason == "CONFIG_INVALID"
        assert f"LORAPLEX_ISA is {asked!r}" in caught.value.message
    assert not any(tmp_path.iterdir())


def test_the_variable_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, chosen in (("portable", "portable"), ("", build.supported_isas()[0])):
        monkeypatch.setenv("LORAPLEX_ISA", asked)
        assert build.chosen_isa() == chosen


def test_an_instruction_set_that_the_processor_lacks_is_refused() -> None:
    with pytest.raises(build.KernelsUnavailable, match="it runs"):
        build.load("sparc")
