"""Numbers and structs that Python and C++ both define are the same in both."""

from __future__ import annotations

import re
from enum import Enum
from itertools import accumulate

import pytest
from loraplex_model.adapters.delta import Activation, Reads, SiteDelta, tensor_fields
from loraplex_model.adapters.table import ENTRY, Uses
from loraplex_model.base.config import FUSED, LAYER_SITES, MODEL_SITES, Gate, NormSpan
from loraplex_model.base.draws import DrawState
from loraplex_model.base.weights import BLOCK
from loraplex_model.decoder import layout
from loraplex_model.ops.build import SOURCES

CODE = re.sub(r"//[^\n]*", "", "".join(path.read_text() for path in SOURCES.rglob("*.h")))


def enum(name: str) -> dict[str, int]:
    """The numbers of a C++ enum, by name."""
    found = re.search(rf"enum (?:class )?{name}\b[^{{]*{{([^}}]*)}}", CODE)
    assert found is not None, name
    parts = [part.split("=") for part in found[1].split(",")]
    given = [int(part[1]) if len(part) > 1 else None for part in parts]
    numbers = accumulate(given, lambda last, own: last + 1 if own is None else own, initial=-1)
    return dict(zip((part[0].strip() for part in parts), list(numbers)[1:], strict=True))


def fields(name: str) -> list[str]:
    """The fields of a C++ struct, in order."""
    found = re.search(rf"struct {name} {{(.*?)\n}};", CODE, re.S)
    assert found is not None, name
    data = found[1].partition("(")[0]  # functions come last
    declared = [line for line in data.split(";")[:-1] if "=" not in line]
    names = [re.findall(r"(\w+)\s*(?:,|$)", line.strip()) for line in declared]
    return [one for line in names for one in line]


def constant(name: str) -> int:
    found = re.search(rf"constexpr int {name} = (\d+);", CODE)
    assert found is not None, name
    return int(found[1])


def test_sites_lie_in_the_same_order() -> None:
    cpp = enum("LayerSite")
    assert cpp.pop("LAYER_SITES") == len(LAYER_SITES)
    assert cpp == {name.upper(): i for i, name in enumerate(LAYER_SITES)}
    cpp = enum("ModelSite")
    cpp["NORM"] = cpp.pop("FINAL_NORM")  # NORM is a bit of Use
    assert cpp.pop("MODEL_SITES") == len(MODEL_SITES)
    assert cpp == {name.upper(): i for i, name in enumerate(MODEL_SITES)}


def test_fused_matrices_lie_in_the_same_order() -> None:
    cpp = enum("FusedMatrix")
    assert cpp.pop("FUSED_MATRICES") == len(FUSED)
    assert cpp == {name.upper(): i for i, name in enumerate(FUSED)}
    assert constant("MAX_PARTS") == max(map(len, FUSED.values()))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("Use", Uses),
        ("Activation", Activation),
        ("Reads", Reads),
        ("Fault", layout.Fault),
        ("NormSpan", layout.Span),
    ],
)
def test_enums_have_the_same_numbers(name: str, ours: type[Enum]) -> None:
    assert enum(name) == {member.name: member.value for member in ours}


def test_settings_of_a_decoder_have_a_number() -> None:
    assert {layout.Span.of(span).name.removesuffix("_SPAN") for span in NormSpan} == {
        span.name for span in NormSpan
    }
    assert {gate.name for gate in Gate} <= {activation.name for activation in Activation}


def test_kinds_of_matrices_and_sizes_of_blocks_are_the_same() -> None:
    kinds = {name.upper(): number for name, number in enum("Kind").items()}
    assert kinds == {kind.name: kind.value for kind in layout.Storage}
    assert constant("PANEL") == layout.PANEL
    assert constant("BLOCK") == BLOCK


def test_the_state_of_a_draw_has_the_same_fields() -> None:
    assert fields("Draw") == [name for name, *_ in DrawState._fields_]


def test_an_entry_has_the_same_fields() -> None:
    assert fields("Entry") == list(ENTRY.names or ())
    assert ENTRY.itemsize == 8 * 8 + 4 * 4


@pytest.mark.parametrize(
    "name", ["Matrix", "NormWeights", "Rotary", "Layer", "SlotTable", "Model", "Batch"]
)
def test_structs_have_the_same_fields(name: str) -> None:
    ours = [field[0].removesuffix("_") for field in getattr(layout, f"C{name}")._fields_]
    assert fields(name) == ours


@pytest.mark.parametrize("kind", SiteDelta.__args__)
def test_tensors_are_packed_in_the_order_of_an_entry(kind: type[SiteDelta]) -> None:
    order = [ENTRY.names.index(field.entry) for field in tensor_fields(kind)]
    assert order == sorted(order)
