"""BOTTLENECK, a `peft_type` of this project: stream += scaling * (up(f(down(x))) + biases).

PEFT has no such kind. `reads` determines x: the normed input of the block (parallel adapters, He et
al. 2021), the block's output (Houlsby et al. 2019), the residual stream after the block (Pfeiffer
et al. 2020) or before its norm. docs/adapters.md describes the format.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.modules import BOTTLENECKS
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import served

_SAME = ("relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu")
ACTIVATIONS = {"linear": "none", **{name: name for name in _SAME}}
"""Name of a `loraplex_model.adapters.delta.Activation` by the word in the configuration."""

READS = {name: name for name in ("normed", "output", "stream", "incoming")}
PLACEMENTS = {"attention": "attention_bottleneck", "mlp": "mlp_bottleneck"}

_DOWN, _UP = "bottleneck_down", "bottleneck_up"
_ENDINGS = {f"{which}.{part}": "" for which in (_DOWN, _UP) for part in ("weight", "bias")}


@dataclass(frozen=True, slots=True)
class BottleneckReading:
    """The options of a BOTTLENECK configuration; `size` is None if widths differ by site."""

    size: int | None
    activation: str
    reads: str
    scaling: float
    placements: tuple[str, ...]

    def place(self, file: Placement) -> list[ModuleSpec]:
        """The bottlenecks in the file; a layer need not have all of them."""
        if self.size is not None:
            file.check_rank("bottleneck_size", self.size)
        modules = []
        for site in file.sites(*_ENDINGS):
            if site[1] not in BOTTLENECKS:
                continue
            tensors = {
                "down": file.require(site, f"{_DOWN}.weight"),
                "up": file.require(site, f"{_UP}.weight"),
            }
            for role, ending in (("down_bias", f"{_DOWN}.bias"), ("up_bias", f"{_UP}.bias")):
                if (bias := file.claim(site, ending)) is not None:
                    tensors[role] = bias
            file.check_scale(site, self.scaling, "scaling")
            down = tensors["down"]
            width = self.size or (down.shape[0] if down else 0) or 1
            held = file.of_rank(site, tensors, width, "bottleneck_size")
            if held is None:
                continue
            if site[1] not in self.placements:
                message = f"{file.path(site)} has weights but is not among the placements"
                file.find(Reason.ADAPTER_INVALID, message, "placements")
                continue
            modules.append(
                ModuleSpec(*site, held, width, self.scaling, (), self.activation, self.reads)
            )
        return modules


def _read(reader: Reader) -> BottleneckReading | None:
    size = reader.optional_integer("bottleneck_size")
    scaling = reader.number("scaling", 1.0)
    names = reader.names("placements")
    unknown = [name for name in names if name not in PLACEMENTS]
    if unknown or not names:
        reader.unsupported("placements", f"does not consist of {', '.join(PLACEMENTS)}")
    reading = BottleneckReading(
        size=size,
        activation=reader.choice("non_linearity", ACTIVATIONS, "relu"),
        reads=reader.choice("reads", READS, "normed"),
        scaling=scaling or 0.0,
        placements=tuple(PLACEMENTS[name] for name in names if name in PLACEMENTS),
    )
    return None if scaling is None else reading


BOTTLENECK = Kind(
    peft_type="BOTTLENECK",
    summary="bottleneck adapters (our own format)",
    options={
        "bottleneck_size": served("null: every site has its own width"),
        "non_linearity": served(", ".join(ACTIVATIONS)),
        "placements": served(", ".join(PLACEMENTS)),
        "reads": served(", ".join(READS)),
        "scaling": served(),
    },
    endings=_ENDINGS,
    read=_read,
)
