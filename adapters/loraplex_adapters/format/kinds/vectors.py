"""Kinds with one vector for each module: IA3, BEFT and LN_TUNING."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.copies.names import COPY_ENDINGS
from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.whole import (
    SAVED_BIAS_ENDING,
    SAVED_OPTION,
    norm_or_weight,
    place_saved,
)
from loraplex_adapters.format.modules import MATRICES, NORMS, base_sites
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import ignored, served
from loraplex_adapters.format.targets import Targets

_NORM, _NORM_BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"
_ENDINGS = {**COPY_ENDINGS, SAVED_BIAS_ENDING: "modules_to_save"}
_TARGETS = {
    **SAVED_OPTION,
    "target_modules": served("projections; names or an expression"),
}


@dataclass(frozen=True, slots=True)
class Ia3Reading:
    """IA3: y = l * (W x + b), or W (l * x) + b for a feed-forward module.

    `feedforward` lists ends of paths; it is None if the file has a regular expression, and then the
    shapes of the tensors decide.
    """

    targets: Targets
    feedforward: tuple[str, ...] | None

    def place(self, file: Placement) -> list[ModuleSpec]:
        """A gain of the output or of the input of each module."""
        adapted = file.sites("ia3_l")
        modules = []
        for site in adapted:
            tensor = file.require(site, "ia3_l")
            assert tensor is not None, "sites() found it"
            role = "in_gain" if tensor.shape[0] == 1 else "out_gain"
            if file.fits(site, {role: tensor}) is None:
                continue
            path, is_input = file.path(site), role == "in_gain"
            if self.feedforward is not None and self._is_feedforward(path) != is_input:
                side = role.removesuffix("_gain")
                message = f"{path} has a vector for its {side}put, which contradicts "
                message += "feedforward_modules"
                file.find(Reason.ADAPTER_INVALID, message, "feedforward_modules")
                continue
            modules.append(ModuleSpec(*site, {role: tensor}))
        projections = [site for site in base_sites(file.base) if site[1] in MATRICES]
        file.check_targets(self.targets, projections, adapted)
        return modules + place_saved(file, self.targets)

    def _is_feedforward(self, path: str) -> bool:
        # PEFT compares the ends of the paths as text.
        return path.endswith(self.feedforward or ())


@dataclass(frozen=True, slots=True)
class VectorReading:
    """BEFT and LN_TUNING: one tensor for each module, or two for a norm with a bias.

    Attributes:
        ending, role: end of the tensors' names, and their role.
        modules: names of the modules that can have such a tensor.
    """

    targets: Targets
    ending: str
    role: str
    modules: tuple[str, ...]

    def place(self, file: Placement) -> list[ModuleSpec]:
        """The tensors of each module."""
        adapted = file.sites(self.ending)
        modules = []
        for site in adapted:
            if site[1] not in self.modules:
                tensor = file.claim(site, self.ending)
                assert tensor is not None, "sites() found it"
                message = f"{tensor.name} changes {site[1]} in a way that is not supported"
                file.find(Reason.ADAPTER_UNSUPPORTED, message, tensor.name)
            elif self.role == "weight":
                weight = file.require(site, self.ending)
                modules += norm_or_weight(file, site, [weight], _NORM_BIAS)
            else:
                modules += file.single(site, self.ending, self.role)
        candidates = [site for site in base_sites(file.base) if site[1] in self.modules]
        file.check_targets(self.targets, candidates, adapted)
        return modules + place_saved(file, self.targets)


def _read_ia3(reader: Reader) -> Ia3Reading:
    value = reader.config.get("feedforward_modules")
    names = reader.names("feedforward_modules") if not isinstance(value, str) else None
    return Ia3Reading(reader.targets(), names)


def _read_beft(reader: Reader) -> VectorReading:
    return VectorReading(reader.targets(), "beft_bias", "bias_delta", MATRICES)


def _read_norms(reader: Reader) -> VectorReading:
    return VectorReading(reader.targets(), _NORM, "weight", NORMS)


IA3 = Kind(
    peft_type="IA3",
    summary="(IA)3: gains on outputs and inputs",
    options={
        **_TARGETS,
        "exclude_modules": served("names or an expression"),
        "fan_in_fan_out": ignored("no served base is transposed"),
        "feedforward_modules": served("those whose input is scaled"),
        "init_ia3_weights": ignored(),
    },
    endings={"ia3_l": "", **_ENDINGS},
    read=_read_ia3,
)

BEFT = Kind(
    peft_type="BEFT",
    summary="BEFT: trained biases, also if the base has none",
    options={**_TARGETS, "init_weights": ignored()},
    endings={"beft_bias": "", **_ENDINGS},
    read=_read_beft,
)

LN_TUNING = Kind(
    peft_type="LN_TUNING",
    summary="trained norms",
    options={
        **SAVED_OPTION,
        "exclude_modules": served("names or an expression"),
        "target_modules": served("norms; names or an expression"),
    },
    endings={_NORM: "", _NORM_BIAS: "", **_ENDINGS},
    read=_read_norms,
)
