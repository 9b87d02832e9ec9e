"""The launches of a pass: embedding, layers, head. Reads nothing back and allocates no activations.

What is launched depends on the shape of a pass alone; what varies from pass to pass with one shape
is read from device memory. So a captured graph of the launches computes any pass of the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_model.adapters.merge import fused_matrix
from loraplex_model.base.config import FUSED, MODEL, DecoderConfig, Norm, Site
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.attention import Scoring
from loraplex_model.decoder.cuda.kernels import attention, heads, lora, rows
from loraplex_model.decoder.cuda.pack import DeviceMatrix, pack_matrix
from loraplex_model.decoder.cuda.places import PositionTables
from loraplex_model.decoder.cuda.products import Products
from loraplex_model.decoder.cuda.step.own_rows import HeadStates
from loraplex_model.decoder.cuda.step.passes import DevicePass
from loraplex_model.decoder.cuda.step.workspace import Workspace
from loraplex_model.ops.linear import by_tiles

Matrices = Sequence[dict[str, DeviceMatrix]]
"""The matrices of each layer, by their names in `FUSED`."""


@dataclass(frozen=True, slots=True)
class _Fused:
    """A fused matrix of one layer: its weights, its place in the slot table, its modules."""

    layer: int
    name: str
    matrix: DeviceMatrix
    site: int
    modules: tuple[tuple[str, int], ...]

    @property
    def widths(self) -> list[int]:
        return [width for _, width in self.modules]


class Network:
    """A base model on a device, with its KV cache.

    Attributes:
        places: what positions mean for attention.
    """

    def __init__(
        self,
        weights: BaseWeights,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        positions: int,
        products: Products,
        matrices: Matrices,
    ) -> None:
        """`keys` and `values` are [blocks, kv_heads, block_size, head_dim] for each layer."""
        config, device = weights.config, weights.embed.device
        self._weights, self._keys, self._values = weights, keys, values
        self._products = products
        self._layers = [_fused(config, i, layer) for i, layer in enumerate(matrices)]
        dtype = weights.embed.dtype
        self.places = PositionTables.of(config, positions, dtype, device)
        self._heads = heads.HeadFormula.of(config)
        self._embed_scale = float(torch.tensor(config.embed_scale, dtype=dtype))

    def hidden_states(
        self, step: DevicePass, space: Workspace, last_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Fills the cache; returns the normed states [R, hidden] of the rows with logits.

        They lie in the workspace, at the start of `normed`, and behind them those of the rows whose
        states are wanted. Rows of padding have arbitrary values.
        """
        weights, parallel, own = self._weights, self._weights.config.parallel, step.own
        x, delta, second = (t[: step.rows] for t in (space.x, space.delta, space.second))
        rows.embed(step.tokens, weights.embed, last_tokens, x, self._embed_scale)
        if own is not None:
            own.embed(x, step.tokens, last_tokens, self._embed_scale)
        added: tuple[torch.Tensor, ...] = ()
        for i in range(len(weights.layers)):
            h = self._block_input((i, "input_layernorm"), step, space, added)
            self._block(i, "attention", step, space, h, delta)
            if not parallel:
                h = self._block_input((i, "post_attention_layernorm"), step, space, (delta,))
            self._block(i, "mlp", step, space, h, second if parallel else delta)
            added = (delta, second) if parallel else (delta,)
        final = space.normed[: step.logits]
        weight, bias = weights.norm, weights.norm_bias
        if step.logits:
            self._add_and_norm(x, added, weight, bias, final, step.logit_rows)
            if own is not None:
                own.final_norm(weight, bias, x, added, step.logit_rows, final)
        if states := len(step.state_rows):
            wanted = space.normed[step.logits : step.logits + states]
            self._add_and_norm(x, added, weight, bias, wanted, step.state_rows)
            if own is not None:
                own.final_norm(weight, bias, x, added, step.state_rows, wanted, of_states=True)
        return final

    def head(self, step: DevicePass, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Writes the logits, float32 [R, vocab], of normed states [R, hidden]."""
        if not step.logits:
            return
        weight = self._weights.lm_head
        if not hidden.is_cuda:
            logits.copy_(by_tiles(hidden.float(), weight.float()))
        elif hidden.dtype == torch.float32:
            torch.mm(hidden, weight.T, out=logits)
        else:
            torch.ops.aten.mm.dtype_out(hidden, weight.T, torch.float32, out=logits)
        if step.own is not None:
            step.own.add_head(logits, hidden)
        config = self._weights.config
        if config.logit_scale != 1 or config.logit_softcap:
            rows.finish_logits(logits, config.logit_scale, config.logit_softcap)

    def _block_input(
        self, site: Site, step: DevicePass, space: Workspace, added: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Adds to the residual stream; returns it [T, hidden], normed if the layer does so."""
        layer, name = site
        weights = self._weights.layers[layer]
        weight, bias = weights.norms[name], weights.norm_biases.get(name)
        x, normed = space.x[: step.rows], space.normed[: step.rows]
        if weight is None and not added:
            return x
        self._add_and_norm(x, added, weight, bias, normed)
        if weight is None:
            return x
        if step.own is not None:
            step.own.norm(site, weight, bias, x, normed)
        return normed

    def _add_and_norm(
        self,
        x: torch.Tensor,
        added: tuple[torch.Tensor, ...],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        normed: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> None:
        """`rows.norm_residual` with the formula of the base model."""
        config = self._weights.config
        rows.norm_residual(
            x,
            added[0] if added else None,
            weight,
            normed,
            config.rms_norm_eps,
            wanted,
            second=added[1] if len(added) > 1 else None,
            scale=config.residual_scale,
            bias=bias,
            offset=config.norm_offset,
            is_layer=config.norm is Norm.LAYER,
        )

    def _block(
        self,
        index: int,
        name: str,
        step: DevicePass,
        space: Workspace,
        h: torch.Tensor,
        delta: torch.Tensor,
    ) -> None:
        """Writes what the attention or the MLP with input h adds to the residual stream."""
        compute = self._attention if name == "attention" else self._mlp
        site = index, f"{name}_output_norm"
        layer = self._weights.layers[index]
        weight, bias = layer.norms[site[1]], layer.norm_biases.get(site[1])
        if weight is None:
            compute(index, step, space, h, delta)
        else:
            out = space.block[: step.rows]
            compute(index, step, space, h, out)
            self._add_and_norm(out, (), weight, bias, delta)
            if step.own is not None:
                step.own.norm(site, weight, bias, out, delta)
        if step.own is not None:
            scale, stream = self._weights.config.residual_scale, space.x[: step.rows]
            step.own.add_bottlenecks(index, f"{name}_bottleneck", delta, stream, h, scale)

    def _attention(
        self, index: int, step: DevicePass, space: Workspace, h: torch.Tensor, out: torch.Tensor
    ) -> None:
        """From h to out, both [T, hidden]."""
        config, layer = self._weights.config, self._weights.layers[index]
        keys, values = self._keys[index], self._values[index]
        qkv, q, mixed = (t[: step.rows] for t in (space.qkv, space.q, space.mixed))
        self._project(index, "qkv", step, space, h, qkv)
        cos, sin = self.places.of_layer(config, index)
        heads.rope_cache(
            qkv,
            step.table_rows,
            step.kv_slots,
            cos,
            sin,
            q,
            keys,
            values,
            layer.q_norm,
            layer.k_norm,
            self._heads,
            self.places.query_scales,
        )
        if step.own is not None and layer.q_norm is not None and layer.k_norm is not None:
            states = HeadStates(
                qkv=qkv,
                table_rows=step.table_rows,
                kv_slots=step.kv_slots,
                cos=cos,
                sin=sin,
                query_scales=self.places.query_scales,
                q=q,
                keys=keys,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
            )
            step.own.head_norms(index, states)
        scoring = Scoring.of(config, config.sliding_windows[index])
        if step.short is not None:
            attention.attend_short(
                q, keys, values, step.tables, step.short, space.chunks, mixed, scoring
            )
        if step.tall is not None:
            attention.attend_tall(q, keys, values, step.tables, step.tall, mixed, scoring)
        self._project(index, "o", step, space, mixed.flatten(1), out)

    def _mlp(
        self, index: int, step: DevicePass, space: Workspace, h: torch.Tensor, out: torch.Tensor
    ) -> None:
        """From h to out, both [T, hidden]."""
        config = self._weights.config
        gate_up, active = space.gate_up[: step.rows], space.active[: step.rows]
        fused = self._layers[index]["gate_up"]
        if step.lora is None or not config.gated:
            self._project(index, "gate_up", step, space, h, gate_up)
            rows.activate(gate_up, active, config.activation, is_gated=config.gated)
        else:
            self._product(fused, step, h, gate_up)
            inner = lora.h_view(space.low_rank, step.lora, h.shape[1], 2)
            lora.shrink(h, inner, step.lora, fused.site, 2)
            lora.expand_gated(inner, gate_up, active, step.lora, fused.site, config.activation)
        self._project(index, "down", step, space, active, out)

    def _project(
        self,
        index: int,
        name: str,
        step: DevicePass,
        space: Workspace,
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        """A fused matrix with the rows' adapters: x [T, in], y [T, out]."""
        fused = self._layers[index][name]
        self._product(fused, step, x, y)
        if step.lora is not None:
            h = lora.h_view(space.low_rank, step.lora, x.shape[1], len(fused.modules))
            lora.shrink(x, h, step.lora, fused.site, len(fused.modules))
            lora.expand(h, y, step.lora, fused.site, fused.widths)

    def _product(self, fused: _Fused, step: DevicePass, x: torch.Tensor, y: torch.Tensor) -> None:
        """The base's product, and its replacements for rows with input gains or merged matrices."""

        def product(own: torch.Tensor, out: torch.Tensor) -> None:
            self._products.multiply(fused.matrix, own, out)

        product(x, y)
        if step.own is not None:
            step.own.project(fused.layer, fused.name, fused.modules, x, y, product)


def device_matrices(weights: BaseWeights) -> Matrices:
    """The base's matrices in the layout of the kernels, on the device of the weights."""
    dtype, device = weights.embed.dtype, weights.embed.device
    return [
        {name: pack_matrix(*fused_matrix(layer, name), device, dtype=dtype) for name in FUSED}
        for layer in weights.layers
    ]


def _fused(
    config: DecoderConfig, index: int, matrices: dict[str, DeviceMatrix]
) -> dict[str, _Fused]:
    shapes = config.projection_shapes()
    assert index != MODEL
    return {
        name: _Fused(
            index,
            name,
            matrices[name],
            config.site_index((index, modules[0])),
            tuple((module, shapes[module][1]) for module in modules),
        )
        for name, modules in config.fused.items()
    }
