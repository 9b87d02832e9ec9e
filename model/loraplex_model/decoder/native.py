"""The decoder on the CPU, which computes the whole pass in one call into the C++ kernels.

Weights, cache and adapters are stored in the compute dtype (bfloat16 or float32); activations and
sums are float32. If the dtype is bfloat16 and the library has products of bfloat16 (`cpu/tiles.h`),
the inputs of products are rounded to bfloat16. The arithmetic of a row depends on its own sequence
only, so its bits are the same alone, in any batch, and for any division of its prompt into chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p

import numpy as np
import torch

from loraplex_model.adapters.delta import Activation
from loraplex_model.adapters.merge import merge_layers
from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.adapters.table import Merged, SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import FUSED, Norm, Rope
from loraplex_model.base.weights import BLOCK, BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.decoder import layout, paired
from loraplex_model.decoder.forward import query_scale
from loraplex_model.decoder.layout import (
    CLayer,
    CMatrix,
    CModel,
    CNormWeights,
    CRotary,
    Fault,
    PassOutOfBounds,
    Span,
    Storage,
)
from loraplex_model.decoder.reference import copy_blocks, write_blocks
from loraplex_model.decoder.sampling import NativeSampling
from loraplex_model.ops import build, mapping, nf4
from loraplex_model.ops.rope import tables

_NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    **{name: name for name in ("q_norm", "k_norm", "attention_output_norm", "mlp_output_norm")},
}
"""The norms of a layer in `CLayer`, and the names of their sites."""


class NativeDecoder:
    """Computes forward passes of one base model; owns its KV cache and its slot table.

    Not thread-safe: one pass at a time, and adapters may not change during a pass.

    Attributes:
        block_size: tokens of a KV block.
        kernels: what computes the passes, for people.
        table: the resident adapters.
        keys, values: per layer [blocks, kv_heads, block_size, head_dim], compute dtype; for
            products of bfloat16 in the form of `paired.shapes`.
    """

    def __init__(
        self,
        weights: BaseWeights,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        *,
        max_positions: int | None = None,
        threads: int | None = None,
        library: build.Kernels | None = None,
    ) -> None:
        """Packs the weights for the kernels.

        `max_positions` is the longest sequence (default: the model's context). Without `library`
        the default build is loaded, which raises `KernelsUnavailable` if there is none.
        """
        config = weights.config
        dtype = weights.embed.dtype
        assert dtype in (torch.float32, torch.bfloat16)
        self.weights = weights
        self.block_size = block_size
        self._library = library or build.load()
        self._library.loraplex_workspace.restype = c_void_p
        self._workspace = c_void_p(self._library.loraplex_workspace())
        self._kept: list[torch.Tensor] = []
        self.isa = self._library.isa
        self._bf16_products = dtype == torch.bfloat16 and self._library.loraplex_bf16_order() > 0
        self.kernels = f"C++ {self.isa}{', bfloat16 products' * self._bf16_products}"
        self.table = SlotTable(num_slots, config)
        part = (block_size, config.head_dim)
        forms = paired.shapes(*part) if self._bf16_products else (part, part)
        self.keys, self.values = (
            [self._pages(num_blocks, form, dtype) for _ in weights.layers] for form in forms
        )
        self._arena = mapping.Arena(
            sum(
                layout.nf4_room(*matrix.shape)
                for layer in weights.layers
                for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)
                if matrix.shape[1] % BLOCK == 0
            )
        )

        self._layers = (CLayer * config.num_layers)(
            *(self._layer(i, layer) for i, layer in enumerate(weights.layers))
        )
        self._threads = threads or torch.get_num_threads()
        self._model = self._c_model(block_size, max_positions, self._threads)

    def __del__(self) -> None:
        if hasattr(self, "_workspace"):
            self._library.loraplex_free_workspace(self._workspace)

    def forward(
        self,
        batch: ForwardBatch,
        logits: torch.Tensor | None = None,
        *,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes a pass and fills the cache; returns logits, float32 [R, vocab].

        They are written to `logits` if it is given, and the states of `batch.state_rows` to
        `states`, float32 [H, hidden]. Raises `MemoryError` and `PassOutOfBounds`.
        """
        copy_blocks(batch, self.keys, self.values)
        shape = (len(batch.logit_rows), self.weights.config.vocab_size)
        if logits is None:
            logits = torch.empty(shape)
        assert (logits.shape, logits.dtype) == (shape, torch.float32)
        assert logits.is_contiguous()
        wanted = (len(batch.state_rows), self.weights.config.hidden_size)
        if states is None:
            assert not len(batch.state_rows), "states are wanted, and there is no place for them"
        else:
            assert (states.shape, states.dtype) == (wanted, torch.float32)
            assert states.is_contiguous()
        fault = self._library.loraplex_forward(
            byref(self._model),
            byref(layout.c_batch(batch)),
            self._workspace,
            c_void_p(logits.data_ptr()),
            c_void_p(None if states is None else states.data_ptr()),
        )
        if fault == Fault.NO_MEMORY:
            raise MemoryError(f"no memory for a pass of {len(batch.tokens)} tokens")
        if fault:
            raise PassOutOfBounds(f"a pass was not computed: {layout.FAULTS[fault]}")
        return logits

    def sampling(self) -> NativeSampling:
        """The sampler of the same kernels, with as many threads."""
        return NativeSampling(self._library, self._threads)

    def merge(self, adapter: PackedAdapter, dtype: torch.dtype) -> Merged:
        """Merges an adapter: dense copies, in `dtype` and in panels, of the matrices it changes.

        Only reads the base's weights, so it may run during a pass.
        """
        config = self.weights.config
        changes = adapter.unpack()
        structs: list[CMatrix] = []
        kept: list[torch.Tensor] = []
        addresses = np.zeros((config.num_layers, len(FUSED)), np.uint64)
        for (layer, fused), dense in merge_layers(self.weights, changes, dtype):
            matrix, panels = self._packed(dense.weight, dense.bias)
            kept += [panels] if dense.bias is None else [panels, dense.bias]
            structs.append(matrix)
            addresses[layer, list(FUSED).index(fused)] = addressof(structs[-1])
        nbytes = sum(tensor.nbytes for tensor in kept)
        return Merged({}, addresses, nbytes, (*structs, *kept))

    def write_prefix(self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [layers, n, kv_heads, head_dim] to the start of `blocks`."""
        if self._bf16_products:
            for layer in zip(keys, values, self.keys, self.values, strict=True):
                paired.write(blocks, *layer)
            return
        for states, caches in ((keys, self.keys), (values, self.values)):
            write_blocks(blocks, states, [cache.transpose(1, 2) for cache in caches])

    def _pages(self, num_blocks: int, form: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A layer's keys or values, zeros: [num_blocks, kv_heads, *form]."""
        shape = (num_blocks, self.weights.config.num_kv_heads, *form)
        return mapping.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _keep(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _c_model(self, block_size: int, max_positions: int | None, threads: int) -> CModel:
        """The whole model as the kernels read it."""
        weights, config = self.weights, self.weights.config
        lm_head = self._dense(weights.lm_head, None)
        positions = max_positions or config.max_positions
        long = () if config.long_rope is None else (config.long_rope,)
        ropes = (*config.ropes, *long)
        self._rotaries = (CRotary * len(ropes))(*(self._rotary(rope, positions) for rope in ropes))
        scale = query_scale(config, torch.arange(positions))
        return CModel(
            layers=self._layers,
            embed=lm_head.data if config.tie_embeddings else self._keep(weights.embed),
            norm=CNormWeights(self._keep(weights.norm), self._keep(weights.norm_bias)),
            lm_head=lm_head,
            rotaries=self._rotaries,
            query_scale=self._keep(scale),
            adapters=layout.c_adapters(self.table),
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            threads=threads,
            eps=config.rms_norm_eps,
            attention_scale=config.softmax_scale,
            norm_offset=config.norm_offset,
            embed_scale=config.embed_scale,
            residual_scale=config.residual_scale,
            logit_scale=config.logit_scale,
            logit_softcap=config.logit_softcap,
            attention_softcap=config.attention_softcap,
            embed_in_panels=config.tie_embeddings,
            bf16_storage=weights.embed.dtype == torch.bfloat16,
            layer_norm=config.norm is Norm.LAYER,
            qk_span=Span.of(config.qk_norm_span),
            activation=Activation[config.activation.name],
            gated=config.gated,
            parallel=config.parallel,
            interleaved=config.rope_interleaved,
            long_rotary=len(config.ropes) if long else 0,
            scaled_prompts=config.scaled_prompts,
            vocab=config.vocab_size,
            positions=positions,
            blocks=len(self.keys[0]),
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            normalised_experts=config.normalised_experts,
            bf16_products=self._bf16_products,
        )

    def _rotary(self, rope: Rope, positions: int) -> CRotary:
        inv_freq = torch.tensor(rope.inv_freq)
        cos, sin = tables(torch.arange(positions), inv_freq, rope.scale)
        return CRotary(self._keep(cos), self._keep(sin), len(inv_freq))

    def _layer(self, index: int, layer: LayerWeights) -> CLayer:
        config = self.weights.config
        norms = {
            field: CNormWeights(self._keep(layer.norms[name]), self._keep(bias))
            for field, name in _NORMS.items()
            for bias in (layer.norm_biases.get(name),)
        }
        return CLayer(
            **norms,
            qkv=self._matrix(layer.qkv, layer.qkv_bias),
            o=self._matrix(layer.o, layer.o_bias),
            gate_up=self._matrix(layer.gate_up, layer.gate_up_bias),
            down=self._matrix(layer.down, layer.down_bias),
            router=self._keep(layer.router),
            keys=self.keys[index].data_ptr(),
            values=self.values[index].data_ptr(),
            window=config.sliding_windows[index] or 0,
            rotary=config.layer_rope(index),
        )

    def _matrix(self, matrix: NF4Matrix, bias: torch.Tensor | None) -> CMatrix:
        out, fan_in = matrix.shape
        if fan_in % BLOCK:  # panels cannot hold blocks that cross rows, so keep the dense values
            return self._dense(nf4.dequantize(matrix), bias)
        codes, scales = layout.nf4_panels(
            self._library,
            matrix.packed,
            nf4.absmax_float(matrix),
            out,
            fan_in,
            bf16_products=self._bf16_products,
            empty=self._arena.take,
        )
        return CMatrix(
            data=self._keep(codes),
            absmax=self._keep(scales),
            bias=self._keep(None if bias is None else bias.float()),
            out=out,
            in_=fan_in,
            kind=Storage.NF4_PACKED if self._bf16_products else Storage.NF4,
        )

    def _dense(self, rows: torch.Tensor, bias: torch.Tensor | None) -> CMatrix:
        bias = None if bias is None else bias.float().contiguous()
        matrix, panels = self._packed(rows, bias)
        self._keep(panels)
        self._keep(bias)
        return matrix

    def _packed(
        self, rows: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[CMatrix, torch.Tensor]:
        """A matrix of dense rows, and its weights in panels; both and the bias must live as long.

        The bias is float32.
        """
        if self._bf16_products and rows.dtype == torch.bfloat16:
            panels, kind = layout.packed_panels(self._library, rows), Storage.BF16_PACKED
        else:
            panels = mapping.moved(layout.dense_panels(rows))
            kind = Storage.BF16 if rows.dtype == torch.bfloat16 else Storage.F32
        matrix = CMatrix(
            data=panels.data_ptr(),
            absmax=None,
            bias=bias.data_ptr() if bias is not None else None,
            out=rows.shape[0],
            in_=rows.shape[1],
            kind=kind,
        )
        return matrix, panels
