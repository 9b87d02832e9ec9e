"""MISS: y += block^T s, where s adds up the inputs whose numbers are equal modulo r."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.folded.base import (
    DROPOUT,
    ENDINGS,
    EXCLUDED_OPTION,
    TARGET_OPTIONS,
    FoldedReading,
    folded,
    measured,
    read_bias,
    shape_of,
    states,
)
from loraplex_adapters.format.kinds.whole import BIAS_ENDINGS
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import served

_BLOCK = "miss_block"
_BAT = (
    'is "bat", which multiplies blocks of the base\'s own weights: that change has no low rank; '
    "train it with another value"
)


@dataclass(frozen=True, slots=True)
class MatrixShards:
    """MiSS's block of each module; `mini_r` is the number of its columns, or None for all."""

    r: int
    mini_r: int | None
    marks: Collection[str] = (_BLOCK,)

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose block has the configured size."""
        return [module for site in adapted for module in self._module(file, site)]

    def _module(self, file: Placement, site: Site) -> list[ModuleSpec]:
        fan_in, fan_out = shape_of(file, site)
        tensors = {_BLOCK: file.require(site, _BLOCK)}
        columns = fan_out if self.mini_r is None else "columns"
        held = measured(file, site, tensors, {_BLOCK: ("rows", columns)})
        if held is None or not states(file, site, held["rows"], self.r, "r", "rank"):
            return []
        if self.r > fan_in:
            message = f"r is {self.r}; the input of {file.path(site)} has width {fan_in}"
            file.find(Reason.BASE_MODEL_MISMATCH, message, "r")
            return []
        if self.mini_r is None:
            return folded(file, site, "miss", tensors, self.r)
        if not states(file, site, held["columns"], self.mini_r, "mini_r", "mini_r"):
            return []
        if fan_out % self.mini_r:
            message = f"mini_r is {self.mini_r}, which does not divide the output of "
            message += f"{file.path(site)}, whose width is {fan_out}"
            file.find(Reason.BASE_MODEL_MISMATCH, message, "mini_r")
            return []
        return folded(file, site, "miss", tensors, min(self.r, self.mini_r))


def _read(reader: Reader) -> FoldedReading | None:
    r, targets = reader.integer("r"), reader.targets()
    bias = read_bias(reader, "MiSS_only")
    form = reader.config.get("init_weights")
    mini_r = None
    if form == "mini":
        mini_r = reader.integer("mini_r") if "mini_r" in reader.config else 1
        if mini_r is None:
            return None
    elif form == "bat":
        reader.unsupported("init_weights", _BAT)
        return None
    elif form is not None and not isinstance(form, bool):
        reader.unsupported("init_weights", f"is {shown(str(form))}; known are true, false and mini")
        return None
    return None if r is None else FoldedReading(targets, MatrixShards(r, mini_r), bias)


MISS = Kind(
    peft_type="MISS",
    summary="MiSS: matrix shards",
    options={
        **TARGET_OPTIONS,
        **EXCLUDED_OPTION,
        "bias": served("none, all, MiSS_only"),
        "init_weights": served("true, false, mini; bat is refused, as its change has no low rank"),
        "mini_r": served("with init_weights mini, which has folded rank min(r, mini_r)"),
        "miss_dropout": DROPOUT,
        "r": served(),
    },
    endings={_BLOCK: "", **BIAS_ENDINGS, **ENDINGS},
    read=_read,
)
