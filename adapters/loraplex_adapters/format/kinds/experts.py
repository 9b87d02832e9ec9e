"""LoRA on the experts of a mixture, which PEFT writes for `target_parameters`.

The experts of a layer are two parameters, `gate_up_proj` and `down_proj`, each with the matrices of
all experts. PEFT wraps the module `experts` once for each: the outer wrapper is that of `down_proj`
if both are named. A has rows [experts, rank], B has columns [rank, experts].
"""

from __future__ import annotations

from collections.abc import Collection

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.modules import EXPERT_MATRICES
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation

PARAMETERS_OPTION = "target_parameters"


def read_parameters(reader: Reader) -> tuple[str, ...]:
    """The names of the parameters to adapt; adds a finding for others than those of experts."""
    names = reader.names(PARAMETERS_OPTION)
    for name in names:
        if name.rpartition(".")[2] not in ("gate_up_proj", "down_proj"):
            router = name.endswith("gate.weight")
            what = " (the router, which all-linear includes)" if router else ""
            reader.unsupported(
                PARAMETERS_OPTION,
                f"names {name}{what}; only gate_up_proj and down_proj of experts are served: train "
                "with these, and with modules of the attention",
            )
            return ()
    return names


def expert_module(
    file: Placement,
    site: Site,
    tensors: dict[str, TensorLocation | None],
    rank: int,
    scale: float,
    field: str,
) -> list[ModuleSpec]:
    """The part of an adapter at the experts of a layer; empty, with a finding, if it is unfit."""
    inner, experts = file.fits(site, tensors), file.base.config.num_experts
    if inner is None:
        return []
    path = file.path(site)
    if inner % experts:
        message = f"{path} has {inner} ranks in all, which {experts} experts cannot share"
        file.find(Reason.BASE_MODEL_MISMATCH, message, path)
        return []
    if inner // experts != rank:
        message = (
            f"{path} has rank {inner // experts} in the weights and {rank} in the configuration"
        )
        file.find(Reason.ADAPTER_INVALID, message, field)
        return []
    present = {role: tensor for role, tensor in tensors.items() if tensor is not None}
    return [ModuleSpec(*site, present, rank, scale)]


def check_parameters(file: Placement, names: Collection[str], adapted: Collection[Site]) -> None:
    """Compares the experts that have weights with those that `target_parameters` names."""
    config = file.base.config
    if not names or file.findings:
        return
    if not config.num_experts:
        message = f"{PARAMETERS_OPTION} names parameters of experts; this base has none"
        file.find(Reason.BASE_MODEL_MISMATCH, message, PARAMETERS_OPTION)
        return
    for layer in range(config.num_layers):
        for name in EXPERT_MATRICES:
            path = file.path((layer, name))
            named = any(path == each or path.endswith(f".{each}") for each in names)
            if named != ((layer, name) in adapted):
                why = "is named, but has no weights" if named else "has weights, but is not named"
                message = f"{path} {why} in {PARAMETERS_OPTION}"
                file.find(Reason.ADAPTER_INVALID, message, PARAMETERS_OPTION)
                return
