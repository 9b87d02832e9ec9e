"""Tensors that several kinds can have in addition: saved modules, trained rows, trained biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.copies.names import INFIXES
from loraplex_adapters.format.modules import EMBEDDING, HEAD, base_sites, role_shapes
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import Option, served
from loraplex_adapters.format.targets import EMBEDDINGS, Targets

SAVED_ENDING, SAVED_BIAS_ENDING = "weight", "bias"
_BIAS, WRAPPED_BIAS = "bias", "base_layer.bias"
"""A trained bias of a projection that is not adapted, and of one that is."""

BIAS_ENDINGS: Mapping[str, str] = {WRAPPED_BIAS: "bias", _BIAS: "bias"}
"""Ends of the names of trained biases, with the option that writes them."""

SAVED_OPTION: Mapping[str, Option] = {
    "modules_to_save": served("lm_head, embed_tokens and norms; no projections"),
}

UNSAVED = ("layers", "mlp", "model", "rotary_emb", "self_attn")
"""Modules of every base that are not served if they are saved completely."""

ROWS_ENDING, ROWS_OPTION = "token_adapter.trainable_tokens_delta", "trainable_token_indices"
_BY_NAME = {
    "embed_tokens": EMBEDDING,
    "model.embed_tokens": EMBEDDING,
    "model.language_model.embed_tokens": EMBEDDING,
    "language_model.model.embed_tokens": EMBEDDING,
    "lm_head": HEAD,
}

TokenRows = Mapping[Site, tuple[int, ...]]
"""Token ids of the trained rows of embeddings and head, by site."""


def place_others(
    file: Placement, targets: Targets, bias: str, rows: TokenRows, adapted: list[Site]
) -> list[ModuleSpec]:
    """The parts without A and B: biases, which `bias="all"` saves, saved modules, trained rows."""
    modules = []
    if bias == "all":
        for site in base_sites(file.base):
            if "bias" in role_shapes(site, file.base) and site not in adapted:
                modules += file.single(site, _BIAS, "bias")
    return modules + place_saved(file, targets) + place_rows(file, rows)


def place_saved(file: Placement, targets: Targets) -> list[ModuleSpec]:
    """The modules of `modules_to_save`, which replace the base's.

    If the base ties embeddings and head, and the file has one of them, only that one is replaced,
    as PEFT unties the other.
    """
    modules = []
    claimed: set[str] = set()
    sites = sorted(targets.replaced(base_sites(file.base), file.path))
    for site in sites:
        modules += _saved(file, site)
        claimed.update(n for n in targets.saved if file.path(site).endswith(n))
    if unknown := sorted(set(targets.saved) - claimed):
        name = shown(unknown[0])
        if unknown[0] in UNSAVED or unknown[0].endswith(tuple(f".{part}" for part in UNSAVED)):
            message = f"modules_to_save names {name}; only embeddings, head and norms are served"
            file.find(Reason.ADAPTER_UNSUPPORTED, message, "modules_to_save")
        else:
            message = f"modules_to_save names {name}, which this base does not have"
            file.find(Reason.BASE_MODEL_MISMATCH, message, "modules_to_save")
    file.saved.update(sites)
    both = [m.tensors["weight"] for m in modules if (m.layer, m.module) in EMBEDDINGS]
    if targets.tied and file.base.config.tie_embeddings and len(both) > 1:
        file.twins.append((both[0], both[1]))
    return modules


def _saved(file: Placement, site: Site) -> list[ModuleSpec]:
    """A completely saved weight, which may be in the file under its names in the model as well.

    A norm that has a bias is saved with it.
    """
    named = [tensor for ending in INFIXES if (tensor := file.claim(site, ending)) is not None]
    tensor = file.claim(site, SAVED_ENDING) if named else file.require(site, SAVED_ENDING)
    if named:
        tensor = tensor or named[0]
        file.twins += [(tensor, other) for other in named if other is not tensor]
    return norm_or_weight(file, site, [tensor, *named], SAVED_BIAS_ENDING)


def norm_or_weight(
    file: Placement, site: Site, weights: Sequence[TensorLocation | None], bias_ending: str
) -> list[ModuleSpec]:
    """The part that replaces a weight, and the bias of a norm that has one.

    The first of `weights` is used; the others have the same values. Empty, with a finding, if one
    is missing or unfit.
    """
    held = {"weight": weights[0]}
    if "bias" in role_shapes(site, file.base):
        held["bias"] = file.require(site, bias_ending)
    if any(file.fits(site, {**held, "weight": each}) is None for each in dict.fromkeys(weights)):
        return []
    return [
        ModuleSpec(*site, {role: tensor for role, tensor in held.items() if tensor is not None})
    ]


def read_rows(reader: Reader) -> TokenRows:
    """Reads `trainable_token_indices`: a list for the embeddings, or a map from names to lists."""
    key = ROWS_OPTION
    value = reader.config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        ids = reader.token_ids(key, value)
        return {EMBEDDING: ids} if ids else {}
    rows: dict[Site, tuple[int, ...]] = {}
    for name, item in value.items():
        site = _BY_NAME.get(name)
        if site is None:
            reader.unsupported(key, f"names {shown(name)}, which is neither embeddings nor head")
        elif site in rows:
            reader.invalid(key, f"names {site[1]} twice")
        elif ids := reader.token_ids(key, item):
            rows[site] = ids
    return rows


def place_rows(file: Placement, rows: TokenRows) -> list[ModuleSpec]:
    """The rows that `trainable_token_indices` replaces.

    If the base ties embeddings and head, one tensor replaces the rows of both, unless the two lists
    differ.
    """
    ids = rows.get(EMBEDDING)
    if ids and file.base.config.tie_embeddings and rows.get(HEAD, ids) == ids:
        shared = file.require(EMBEDDING, ROWS_ENDING)
        placed = row_modules(file, EMBEDDING, shared, ids, ROWS_OPTION)
        return placed + [replace(embedding, module=HEAD[1]) for embedding in placed]
    modules = []
    for site, ids in rows.items():
        modules += row_modules(file, site, file.require(site, ROWS_ENDING), ids, ROWS_OPTION)
    return modules


def row_modules(
    file: Placement, site: Site, tensor: TensorLocation | None, ids: tuple[int, ...], key: str
) -> list[ModuleSpec]:
    """Replaced rows of embeddings or head; none, with a finding, if they do not fit the base."""
    count = file.fits(site, {"rows": tensor})
    if count is None or tensor is None:
        return []
    if count != len(ids):
        message = f"{shown(tensor.name)} has {count} rows; {key} lists {len(ids)} tokens"
        file.find(Reason.ADAPTER_INVALID, message, key)
    elif max(ids) >= file.base.config.vocab_size:
        message = f"{key} lists token {max(ids)}; the base has {file.base.config.vocab_size}"
        file.find(Reason.BASE_MODEL_MISMATCH, message, key)
    else:
        return [ModuleSpec(*site, {"rows": tensor}, token_ids=ids)]
    return []
