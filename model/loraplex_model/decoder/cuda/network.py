"""The launches of a pass: embedding, layers, head. Reads nothing back and allocates no activations.

What is launched depends on the shape of a pass alone; what varies from pass to pass with one shape
is read from device memory. So a captured graph of the launches computes any pass of the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_model.adapters.merge import fused_matrix
from loraplex_model.base.config import FUSED, MODEL, DecoderConfig
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.cuda.kernels import attention, lora, rows
from loraplex_model.decoder.cuda.pack import DeviceMatrix, pack_matrix
from loraplex_model.decoder.cuda.products import Products
from loraplex_model.decoder.cuda.step.own_rows import HeadStates
from loraplex_model.decoder.cuda.step.passes import DevicePass
from loraplex_model.decoder.cuda.step.workspace import Workspace
from loraplex_model.ops.linear import by_tiles
from loraplex_model.ops.rope import tables

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
        cos, sin: float32 [positions, head_dim / 2].
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
        cos, sin = tables(
            torch.arange(positions), torch.tensor(config.rope_inv_freq), config.rope_scale
        )
        self.cos = cos.view(positions, -1).to(device)
        self.sin = sin.view(positions, -1).to(device)

    def hidden_states(
        self, step: DevicePass, space: Workspace, last_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Fills the cache; returns the normed states [R, hidden] of the rows with logits.

        They lie in the workspace. Rows of padding have arbitrary values.
        """
        weights, config = self._weights, self._weights.config
        eps, own = config.rms_norm_eps, step.own
        x, normed, delta = (t[: step.rows] for t in (space.x, space.normed, space.delta))
        rows.embed(step.tokens, weights.embed, last_tokens, x)
        if own is not None:
            own.embed(x, step.tokens, last_tokens, config.vocab_size)
        added = None
        for i, layer in enumerate(weights.layers):
            assert layer.input_norm is not None
            assert layer.post_norm is not None
            rows.norm_residual(x, added, layer.input_norm, normed, eps)
            if own is not None:
                own.norm((i, "input_layernorm"), layer.input_norm, x, normed)
            self._attention(i, step, space)
            if own is not None:
                own.add_bottlenecks(i, "attention_bottleneck", delta, x, normed)
            rows.norm_residual(x, delta, layer.post_norm, normed, eps)
            if own is not None:
                own.norm((i, "post_attention_layernorm"), layer.post_norm, x, normed)
            self._mlp(i, step, space)
            if own is not None:
                own.add_bottlenecks(i, "mlp_bottleneck", delta, x, normed)
            added = delta
        final = space.normed[: step.logits]
        if step.logits:
            rows.norm_residual(x, added, weights.norm, final, eps, step.logit_rows)
            if own is not None:
                own.final_norm(weights.norm, x, delta, step.logit_rows, final)
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

    def _attention(self, index: int, step: DevicePass, space: Workspace) -> None:
        """From `normed` to `delta`."""
        config, layer = self._weights.config, self._weights.layers[index]
        window = config.sliding_windows[index]
        keys, values = self._keys[index], self._values[index]
        normed, delta, qkv, q, mixed = (
            t[: step.rows] for t in (space.normed, space.delta, space.qkv, space.q, space.mixed)
        )
        self._project(index, "qkv", step, space, normed, qkv)
        rows.rope_cache(
            qkv,
            step.positions,
            step.kv_slots,
            self.cos,
            self.sin,
            q,
            keys,
            values,
            layer.q_norm,
            layer.k_norm,
            config.rms_norm_eps,
        )
        if step.own is not None and layer.q_norm is not None and layer.k_norm is not None:
            states = HeadStates(
                qkv=qkv,
                positions=step.positions,
                kv_slots=step.kv_slots,
                cos=self.cos,
                sin=self.sin,
                q=q,
                keys=keys,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
            )
            step.own.head_norms(index, states)
        if step.short is not None:
            attention.attend_short(
                q, keys, values, step.tables, step.short, space.chunks, mixed, window=window
            )
        if step.tall is not None:
            attention.attend_tall(q, keys, values, step.tables, step.tall, mixed, window=window)
        self._project(index, "o", step, space, mixed.flatten(1), delta)

    def _mlp(self, index: int, step: DevicePass, space: Workspace) -> None:
        """From `normed` to `delta`."""
        normed, delta, gate_up, active = (
            t[: step.rows] for t in (space.normed, space.delta, space.gate_up, space.active)
        )
        fused = self._layers[index]["gate_up"]
        self._product(fused, step, normed, gate_up)
        if step.lora is None:
            rows.silu_mul(gate_up, active)
        else:
            h = lora.h_view(space.low_rank, step.lora, normed.shape[1], 2)
            lora.shrink(normed, h, step.lora, fused.site, 2)
            lora.expand_silu_mul(h, gate_up, active, step.lora, fused.site)
        self._project(index, "down", step, space, active, delta)

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
        for name, modules in FUSED.items()
    }
