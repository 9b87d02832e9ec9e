"""Kinds with one vector for each module: IA3, BEFT and LN_TUNING."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_model.base.config import PROJECTIONS, Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.whole import SAVED_ENDING, SAVED_OPTION, place_saved
from loraplex_adapters.format.modules import NORMS, base_sites, module_path
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import ignored, served
from loraplex_adapters.format.targets import Targets

_TARGETS = {
    **SAVED_OPTION,
    "target_modules": served("projections; a string is not evaluated"),
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
            if self.feedforward is not None and self._is_feedforward(site) != (role == "in_gain"):
                side = role.removesuffix("_gain")
                message = f"{module_path(*site)} has a vector for its {side}put, which contradicts "
                message += "feedforward_modules"
                file.find(Reason.ADAPTER_INVALID, message, "feedforward_modules")
                continue
            modules.append(ModuleSpec(*site, {role: tensor}))
        file.check_targets(self.targets, _projections(file), adapted)
        return modules + place_saved(file, self.targets)

    def _is_feedforward(self, site: Site) -> bool:
        # PEFT compares the ends of the paths as text.
        return any(module_path(*site).endswith(name) for name in self.feedforward or ())


@dataclass(frozen=True, slots=True)
class BeftReading:
    """BEFT: y = W x + b + bias."""

    targets: Targets

    def place(self, file: Placement) -> list[ModuleSpec]:
        """An added bias for each module."""
        adapted = file.sites("beft_bias")
        modules = []
        for site in adapted:
            tensor = file.require(site, "beft_bias")
            if tensor is not None and file.fits(site, {"bias_delta": tensor}) is not None:
                modules.append(ModuleSpec(*site, {"bias_delta": tensor}))
        file.check_targets(self.targets, _projections(file), adapted)
        return modules + place_saved(file, self.targets)


@dataclass(frozen=True, slots=True)
class NormReading:
    """LN_TUNING: weights that replace those of the norms."""

    targets: Targets

    def place(self, file: Placement) -> list[ModuleSpec]:
        """A weight for each norm."""
        adapted = file.sites(_NORM_ENDING)
        modules = []
        for site in adapted:
            tensor = file.require(site, _NORM_ENDING)
            if tensor is None:
                continue
            if site[1] not in NORMS:
                message = f"{tensor.name} replaces {site[1]}, which is not a norm"
                file.find(Reason.ADAPTER_UNSUPPORTED, message, tensor.name)
            elif file.fits(site, {"weight": tensor}) is not None:
                modules.append(ModuleSpec(*site, {"weight": tensor}))
        norms = [site for site in base_sites(file.base) if site[1] in NORMS]
        file.check_targets(self.targets, norms, adapted)
        return modules + place_saved(file, self.targets)


_NORM_ENDING = "ln_tuning_layers.weight"


def _projections(file: Placement) -> list[Site]:
    return [site for site in base_sites(file.base) if site[1] in PROJECTIONS]


def _read_ia3(reader: Reader) -> Ia3Reading:
    value = reader.config.get("feedforward_modules")
    names = reader.names("feedforward_modules") if not isinstance(value, str) else None
    return Ia3Reading(reader.targets(), names)


def _read_beft(reader: Reader) -> BeftReading:
    return BeftReading(reader.targets())


def _read_norms(reader: Reader) -> NormReading:
    return NormReading(reader.targets())


IA3 = Kind(
    peft_type="IA3",
    summary="(IA)3: gains on outputs and inputs",
    options={
        **_TARGETS,
        "exclude_modules": served(),
        "fan_in_fan_out": ignored("no served base is transposed"),
        "feedforward_modules": served("those whose input is scaled"),
        "init_ia3_weights": ignored(),
    },
    endings={"ia3_l": "", SAVED_ENDING: "modules_to_save"},
    read=_read_ia3,
)

BEFT = Kind(
    peft_type="BEFT",
    summary="BEFT: trained biases, also if the base has none",
    options={**_TARGETS, "init_weights": ignored()},
    endings={"beft_bias": "", SAVED_ENDING: "modules_to_save"},
    read=_read_beft,
)

LN_TUNING = Kind(
    peft_type="LN_TUNING",
    summary="trained norms",
    options={
        **SAVED_OPTION,
        "exclude_modules": served(),
        "target_modules": served("norms; a string is not evaluated"),
    },
    endings={_NORM_ENDING: "", SAVED_ENDING: "modules_to_save"},
    read=_read_norms,
)
