"""The decoder as data: the settings in which the supported families differ."""

from __future__ import annotations

from dataclasses import dataclass

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of a layer's matrices, in the order in which they are applied."""

BLOCKS = {
    name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    for name in (*PROJECTIONS, "q_norm", "k_norm")
}
"""The block of a decoder layer that a module lies in; the layer's own norms lie in neither."""

FUSED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The fused matrices of a layer, and the modules stacked in each, in order."""


def fused_place(module: str) -> tuple[str, int]:
    """The fused matrix that contains a module of `PROJECTIONS`, and the module's index in it."""
    fused = next(fused for fused, names in FUSED.items() if module in names)
    return fused, FUSED[fused].index(module)


LAYER_SITES = (
    *PROJECTIONS,
    "attention_bottleneck",
    "mlp_bottleneck",
    "input_layernorm",
    "post_attention_layernorm",
    "q_norm",
    "k_norm",
)
"""Names of the places of a layer that an adapter can change, in the order of the slot table. The
two bottlenecks are not modules of the base: they follow the attention and the MLP."""

MODEL_SITES = ("embed_tokens", "lm_head", "norm")
"""Names of the places outside the layers that an adapter can change, after the last layer's."""

MODEL = -1
"""Layer number of the sites in `MODEL_SITES`."""

Site = tuple[int, str]
"""A place that an adapter changes: (layer, name), or (`MODEL`, name)."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and a gated SiLU MLP.

    Attributes:
        rope_inv_freq: the head_dim / 2 inverse frequencies, scaling already applied.
        rope_scale: factor on cos and sin (YaRN's attention factor; 1 elsewhere).
        qkv_bias, o_bias: True if those projections have a bias (Qwen2: qkv).
        qk_norm: True if RMSNorm is applied to every query and key head before the rotation (Qwen3).
        sliding_windows: for each layer the number of positions that a token sees, including its own
            (position p sees p - window + 1 to p); None if it sees all.
        max_positions: context length for which the checkpoint was made.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_inv_freq: tuple[float, ...]
    rope_scale: float
    max_positions: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    sliding_windows: tuple[int | None, ...]

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def biased(self) -> frozenset[str]:
        """Names of the projections that carry a bias."""
        return frozenset(PROJECTIONS[:3] * self.qkv_bias + ("o_proj",) * self.o_bias)

    @property
    def num_sites(self) -> int:
        """Number of entries of one adapter in the slot table."""
        return self.num_layers * len(LAYER_SITES) + len(MODEL_SITES)

    def site_index(self, site: Site) -> int:
        """Index of a site in the slot table."""
        layer, name = site
        if layer == MODEL:
            return self.num_layers * len(LAYER_SITES) + MODEL_SITES.index(name)
        return layer * len(LAYER_SITES) + LAYER_SITES.index(name)

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` of each module of `PROJECTIONS`."""
        d, ff = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (d, self.q_size),
            "k_proj": (d, self.kv_size),
            "v_proj": (d, self.kv_size),
            "o_proj": (self.q_size, d),
            "gate_proj": (d, ff),
            "up_proj": (d, ff),
            "down_proj": (ff, d),
        }
