"""From an adapter's tensors to its changes of a base: PEFT's arithmetic, done once at load.

Everything is computed in float32 from the weights as they are served: DoRA's norms are those of the
dequantised NF4 matrices, and replaced weights become differences from the base's stored ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from loraplex_model.adapters.delta import (
    Activation,
    AdapterDelta,
    BottleneckDelta,
    NormDelta,
    ProjectionDelta,
    Reads,
    RowsDelta,
    SiteDelta,
    VirtualTokens,
    is_empty,
)
from loraplex_model.adapters.merge import own_bias, own_weight
from loraplex_model.base.config import DecoderConfig, Site
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.modules import EXPERT_MATRICES, MATRICES, VIRTUAL_TOKENS
from loraplex_adapters.format.spec import CheckedAdapter, ModuleSpec, TensorLocation
from loraplex_adapters.load import folded
from loraplex_adapters.load.folded.base import Tensors


def adapter_delta(
    spec: CheckedAdapter, read: Callable[[TensorLocation], torch.Tensor], base: BaseWeights
) -> AdapterDelta:
    """Returns an adapter's changes of `base`, on the CPU.

    They are float32, except matrices that are left in the file's type. `read` returns a tensor of
    the file. The spec must have been made for this base.
    """
    sites: dict[Site, SiteDelta] = {}
    virtual = None
    shared = folded.regenerated(spec.modules)
    for module in spec.modules:
        tensors = {**shared, **{role: read(at) for role, at in module.tensors.items()}}
        site = module.layer, module.module
        if site == VIRTUAL_TOKENS:
            virtual = _virtual_tokens(tensors, base)
        elif module.module in EXPERT_MATRICES:
            sites |= _experts(module, tensors, base.config)
        elif is_empty(change := _change(module, tensors, base)):
            continue  # AdaLoRA leaves modules without any rank
        elif isinstance(change, ProjectionDelta):
            sites |= parts_of(site, change, base.config)
        else:
            sites[site] = change
    return AdapterDelta(sites, virtual)


def parts_of(
    site: Site, change: ProjectionDelta, config: DecoderConfig
) -> dict[Site, ProjectionDelta]:
    """The change of one of the checkpoint's matrices as changes of the projections in it.

    Rows are divided; A and the gain of the input are those of all parts. Tensors are views.
    """
    parts = config.parts_of(site[1])
    if parts == (site[1],):
        return {site: change}
    found = {}
    for part in parts:
        _, start, count = config.place(part)
        rows = slice(start, start + count)
        found[site[0], part] = replace(
            change,
            b=None if change.b is None else change.b[:, rows],
            gain=None if change.gain is None else change.gain[rows],
            bias=None if change.bias is None else change.bias[rows],
        )
    return found


def _experts(
    module: ModuleSpec, tensors: Tensors, config: DecoderConfig
) -> dict[Site, ProjectionDelta]:
    """The factors of all experts one after the other: a [experts * r, in], b [experts * r, out].

    In the file B is [out, r * experts], with the experts' numbers running fastest.
    """
    count = config.num_experts
    b = tensors["b"].float() * module.scale
    b = b.reshape(len(b), module.rank, count).permute(2, 1, 0)  # [experts, r, out]
    parts = config.fused["gate_up" if module.module == "experts_gate_up" else "down"]
    return {
        (module.layer, part): ProjectionDelta(tensors["a"], own.reshape(-1, own.shape[-1]))
        for part, own in zip(parts, b.chunk(len(parts), dim=-1), strict=True)
    }


def _change(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> SiteDelta:
    if module.module in MATRICES:
        return _projection(module, tensors, base)
    if module.module in ("embed_tokens", "lm_head"):
        return _vocabulary(module, tensors, base)
    if module.module.endswith("_bottleneck"):
        return _bottleneck(module, tensors)
    return _norm(module, tensors, base)


def _projection(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> ProjectionDelta:
    """The terms of y = gain * (W x + base bias) + B A x + bias that equal PEFT's y, by kind:

    LoRA     W x + base bias + s (B A x + b_bias)
    AdaLoRA  as LoRA, with the rows of A multiplied by E
    DoRA     m / |W + s B A| * (W x + s B A x) + base bias, norms of rows (arXiv 2402.09353)
    IA3      out_gain * (W x + base bias), or W (in_gain * x) + base bias
    biases   W x + bias
    folded   as LoRA, with the A and B that `load.folded` computes
    """
    a, b = _factors(module, tensors, base)
    gain = tensors["out_gain"].float().reshape(-1) if "out_gain" in tensors else None
    biases: list[torch.Tensor] = []
    if "b_bias" in tensors:
        biases.append(tensors["b_bias"].float() * module.scale)
    if "bias_delta" in tensors:
        biases.append(tensors["bias_delta"].float().reshape(-1))
    site = module.layer, module.module
    base_bias = own_bias(base, site)
    if base_bias is not None:
        base_bias = _host(base_bias)
    if "magnitude" in tensors:
        assert a is not None
        assert b is not None
        gain = tensors["magnitude"].float() / _row_norms(own_weight(base, site), a, b)
        b = b * gain
        if base_bias is not None:
            biases.append(base_bias * (1 - gain))
    if "bias" in tensors:
        assert base_bias is not None
        biases.append(tensors["bias"].float() - base_bias)
    in_gain = tensors["in_gain"].float().reshape(-1) if "in_gain" in tensors else None
    bias = torch.stack(biases).sum(0) if biases else None
    return ProjectionDelta(a, b, gain, in_gain, bias)


def _vocabulary(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> RowsDelta:
    """Replaced rows, and B A as in PEFT: x += s B A[:, token] at the embeddings, A [r, vocab]."""
    a, b = _factors(module, tensors, base)
    if module.module == "lm_head":
        return RowsDelta(a, b, *_rows(module, tensors, base.lm_head))
    return RowsDelta(None if a is None else a.T, b, *_rows(module, tensors, base.embed))


def _bottleneck(module: ModuleSpec, tensors: Tensors) -> BottleneckDelta:
    down_bias, up_bias = tensors.get("down_bias"), tensors.get("up_bias")
    return BottleneckDelta(
        down=tensors["down"],
        up=tensors["up"].float().T * module.scale,
        down_bias=None if down_bias is None else down_bias.float(),
        up_bias=None if up_bias is None else up_bias.float() * module.scale,
        activation=Activation[module.activation.upper()],
        reads=Reads[module.reads.upper()],
    )


def _factors(
    module: ModuleSpec, tensors: Tensors, base: BaseWeights
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """A as in the file, and B transposed and multiplied by the scale; None at rank 0."""
    if module.fold is not None:
        return folded.factors(module, tensors, base)
    if "a" not in tensors or not module.rank:
        return None, None
    a = tensors["a"]
    if "e" in tensors:
        a = a.float() * tensors["e"].float()
    return a, tensors["b"].float().T * module.scale


def _rows(
    module: ModuleSpec, tensors: Tensors, base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Differences from rows of `base` [vocab, hidden], and their token ids, ascending.

    Trained rows replace those of a weight that is replaced as well.
    """
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if "rows" in tensors:
        ids, order = torch.tensor(module.token_ids, dtype=torch.int32).sort()
        found["rows"] = ids, tensors["rows"][order].float()
    if "weight" in tensors:
        ids, rows = torch.arange(base.shape[0], dtype=torch.int32), tensors["weight"]
        if module.changed_rows:
            ids = torch.tensor(module.changed_rows, dtype=torch.int32)
            rows = rows[ids.long()]
        if "rows" in tensors:
            kept = ~torch.isin(ids, found["rows"][0])
            ids, rows = ids[kept], rows[kept]
        found["weight"] = ids, rows.float()
    if not found:
        return None, None
    ids, order = torch.cat([ids for ids, _ in found.values()]).sort()
    rows = torch.cat([rows for _, rows in found.values()])[order]
    return rows - _host(base[ids.long().to(base.device)]), ids


def _virtual_tokens(tensors: Tensors, base: BaseWeights) -> VirtualTokens:
    if "task_cols" in tensors:
        factors = tensors["task_cols"].float() @ tensors["task_rows"].float()
        return VirtualTokens(embeddings=tensors["prompt"].float() * factors)
    if "prompt" in tensors:
        return VirtualTokens(embeddings=tensors["prompt"])
    config = base.config
    prefix = tensors["prefix"]  # [n, layer, key and value, head, width], all in one row
    prefix = prefix.view(-1, config.num_layers, 2, config.num_kv_heads, config.head_dim)
    keys, values = prefix.permute(2, 1, 0, 3, 4)
    return VirtualTokens(keys=keys, values=values)


def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Norms of the rows of W + s B A, float32 [out], where W is `weight`, which is overwritten."""
    weight.addmm_(b.T.to(weight.device), a.float().to(weight.device))
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1).cpu()
    return norms


def _norm(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> NormDelta:
    name = module.module
    if name == "norm":
        weight, bias = base.norm, base.norm_bias
    else:
        layer = base.layers[module.layer]
        own = layer.norms[name]
        assert own is not None
        weight, bias = own, layer.norm_biases.get(name)
    return NormDelta(
        _difference(tensors.get("weight"), weight), _difference(tensors.get("bias"), bias)
    )


def _difference(tensor: torch.Tensor | None, base: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to a norm's vector in the base; None if the file does not have it."""
    if tensor is None:
        return None
    assert base is not None
    return tensor.float().reshape(-1) - _host(base)


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.float32)
