"""The decoder as data: the settings in which the supported families differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of a layer's matrices, in the order in which they are applied."""

BLOCKS = {
    name: "mlp" if name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj") else "self_attn"
    for name in (*PROJECTIONS, "qkv_proj", "gate_up_proj", "q_norm", "k_norm")
}
"""The block of a decoder layer that a module lies in; the layer's own norms lie in neither."""

FUSED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The fused matrices of a layer, and the modules stacked in each, in order."""

JOINED = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}
"""Name of the one module that some checkpoints hold instead of the modules of a fused matrix."""


LAYER_SITES = (
    *PROJECTIONS,
    "attention_bottleneck",
    "mlp_bottleneck",
    "input_layernorm",
    "post_attention_layernorm",
    "q_norm",
    "k_norm",
    "attention_output_norm",
    "mlp_output_norm",
)
"""Names of the places of a layer that an adapter can change, in the order of the slot table. The
two bottlenecks are not modules of the base: they follow the attention and the MLP. A norm is named
by its role: `input_layernorm` is applied to the attention's input, `post_attention_layernorm` to
the MLP's, and the output norms to what the two blocks add to the residual stream. A checkpoint may
name it otherwise (`families.module_path`)."""

LAYER_NORMS = tuple(name for name in LAYER_SITES if name.endswith("norm"))
"""The norms among `LAYER_SITES`; a family has some of them (`DecoderConfig.norm_widths`)."""

MODEL_SITES = ("embed_tokens", "lm_head", "norm")
"""Names of the places outside the layers that an adapter can change, after the last layer's."""

MODEL = -1
"""Layer number of the sites in `MODEL_SITES`."""

Site = tuple[int, str]
"""A place that an adapter changes: (layer, name), or (`MODEL`, name)."""


class Norm(StrEnum):
    """How a vector is normed before it is multiplied by the norm's weight."""

    RMS = "rms"
    """Divided by the root of its mean square."""
    LAYER = "layer"
    """Its mean is subtracted, and the result divided by its standard deviation."""


class NormSpan(StrEnum):
    """What a norm of queries or keys runs over, and the size of its weight."""

    HEAD = "head"
    """Over each head; all heads share the weight [head_dim]."""
    EACH = "each"
    """Over each head; every head has a weight of its own, [heads * head_dim] in all."""
    ALL = "all"
    """Over all heads together; the weight is [heads * head_dim]."""


class Gate(StrEnum):
    """The activation of the MLP."""

    SILU = "silu"
    GELU = "gelu"
    """The exact GELU, by the error function."""
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary frequencies: [width / 2] of a head's first `width` numbers, which are rotated.

    Attributes:
        inv_freq: inverse frequencies, scaling already applied.
        scale: factor on cos and sin (the attention factor of YaRN and LongRoPE; 1 elsewhere).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0


NO_ROPE = -1
"""Entry of `DecoderConfig.layer_ropes` for a layer without positions."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder with grouped-query attention: the settings in which the supported families differ.

    The fields with defaults are those in which a family may differ from Llama.

        x = embed[token] * embed_scale
        x += residual_scale * output_norm(attention(norm(x)))
        x += residual_scale * output_norm(down(gate(x') * up(x'))),  x' = norm(x)
        logits = softcap(logit_scale * head(norm(x)))

    Attributes:
        rms_norm_eps: added to the mean square (or the variance) in every norm.
        rope_inv_freq, rope_scale: the first of `ropes`, and the only one of most families.
        qkv_bias, o_bias, mlp_bias: True if those projections have a bias (Qwen2: qkv).
        qk_norm: True if queries and keys are normed before the rotation (Qwen3).
        sliding_windows: for each layer the number of positions that a token sees, including its own
            (position p sees p - window + 1 to p); None if it sees all.
        max_positions: context length for which the checkpoint was made.
        norm: how all norms compute.
        norm_bias: True if the norms of the residual stream have a bias.
        norm_offset: added to the weight of every norm (Gemma: 1).
        input_norms: True if the blocks' inputs are normed.
        output_norms: True if the blocks' outputs are normed before they are added.
        parallel: True if the MLP reads the attention's normed input, and both are added at once.
        qk_norm_span: what the norms of queries and keys run over.
        activation: of the MLP.
        gated: False if the MLP is `down(activation(up(x)))`, without a gate.
        joined: the fused matrices that the checkpoint holds as one module (`JOINED`); it is
            quantised as one.
        embed_scale, residual_scale, logit_scale: factors on embeddings, blocks' outputs and logits.
        scaled_prompts: True if `embed_scale` multiplies the embeddings of virtual tokens too.
        logit_softcap: c in `c * tanh(logit / c)`, after `logit_scale`; 0 for none.
        attention_scale: factor on queries times keys; 0 for `head_dim ** -0.5`.
        attention_softcap: c in `c * tanh(score / c)`, before the softmax; 0 for none.
        rope_interleaved: True if the rotated pairs are (2 i, 2 i + 1), not (i, i + width / 2).
        more_ropes: rotary frequencies after the first, for layers with other ones.
        layer_ropes: for each layer its index in `ropes`, or `NO_ROPE`; empty if all have the first.
        long_rope: replaces the first for sequences of more than `short_positions` tokens, prompt
            and answer together (LongRoPE).
        query_scale: b and n in the factor `1 + b * log(1 + floor(position / n))` on queries; empty
            for none (Ministral 3).
        num_experts: experts of each layer's MLP, whose matrices are stacked: `gate_up` has gate and
            up of the first expert, then of the second, and so on; 0 for one MLP without a router.
        experts_per_token: number of experts that compute a token; their outputs are added, weighted
            by the router's probabilities.
        normalised_experts: True if these weights are divided by their sum.
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
    mlp_bias: bool = False
    norm: Norm = Norm.RMS
    norm_bias: bool = False
    norm_offset: float = 0.0
    input_norms: bool = True
    output_norms: bool = False
    parallel: bool = False
    qk_norm_span: NormSpan = NormSpan.HEAD
    activation: Gate = Gate.SILU
    gated: bool = True
    joined: tuple[str, ...] = ()
    embed_scale: float = 1.0
    scaled_prompts: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    rope_interleaved: bool = False
    more_ropes: tuple[Rope, ...] = ()
    layer_ropes: tuple[int, ...] = ()
    long_rope: Rope | None = None
    short_positions: int = 0
    query_scale: tuple[float, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    normalised_experts: bool = False

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> DecoderConfig:
        """The configuration that `asdict` turned into `values`, read from JSON."""
        own: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        own["more_ropes"] = tuple(_rope(each) for each in values.get("more_ropes", ()))
        if values.get("long_rope"):
            own["long_rope"] = _rope(values["long_rope"])
        enums: Mapping[str, type[StrEnum]] = {
            "norm": Norm,
            "qk_norm_span": NormSpan,
            "activation": Gate,
        }
        own |= {key: kind(own[key]) for key, kind in enums.items() if key in own}
        return DecoderConfig(**own)

    def identity(self) -> dict[str, Any]:
        """The values that the fingerprint of a base covers.

        A field with its default is left out, so a new field changes no fingerprint. Frequencies are
        rounded, since their last bits depend on the vector width of the machine.
        """
        values = asdict(self)
        for each in fields(self):
            if values[each.name] == each.default:
                del values[each.name]
        values["rope_inv_freq"] = _shown(self.rope_inv_freq)
        ropes = [_shown(rope.inv_freq) for rope in self.more_ropes]
        for value, shown in zip(values.get("more_ropes", ()), ropes, strict=True):
            value["inv_freq"] = shown
        if self.long_rope is not None:
            values["long_rope"]["inv_freq"] = _shown(self.long_rope.inv_freq)
        return values

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary frequencies of short sequences; `layer_ropes` has indices into them."""
        return Rope(self.rope_inv_freq, self.rope_scale), *self.more_ropes

    def layer_rope(self, layer: int) -> int:
        """Index in `ropes` of a layer's rotary frequencies, or `NO_ROPE`."""
        return self.layer_ropes[layer] if self.layer_ropes else 0

    @property
    def softmax_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.attention_scale or float(self.head_dim**-0.5)

    @property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """As `FUSED`, with the modules that this decoder has; of experts, those of one."""
        return FUSED if self.gated else {**FUSED, "gate_up": ("up_proj",)}

    @property
    def expert_projections(self) -> frozenset[str]:
        """Names of the projections that each expert has; empty for one MLP without a router."""
        return frozenset((*self.fused["gate_up"], "down_proj") if self.num_experts else ())

    def copies_of(self, fused: str) -> int:
        """How often the modules of a fused matrix are stacked in it: once, or for each expert."""
        return (self.num_experts or 1) if fused in ("gate_up", "down") else 1

    @property
    def biased(self) -> frozenset[str]:
        """Names of the projections that carry a bias, joined ones included."""
        names = set(PROJECTIONS[:3] * self.qkv_bias + ("o_proj",) * self.o_bias)
        if self.mlp_bias:
            names |= {*self.fused["gate_up"], "down_proj"}
        names |= {JOINED[fused] for fused in self.joined if names >= {*self.fused[fused]}}
        return frozenset(names)

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
        """`(in_features, out_features)` of each module of `PROJECTIONS` that a layer has."""
        d, ff = self.hidden_size, self.intermediate_size
        shapes = {
            "q_proj": (d, self.q_size),
            "k_proj": (d, self.kv_size),
            "v_proj": (d, self.kv_size),
            "o_proj": (self.q_size, d),
            "gate_proj": (d, ff),
            "up_proj": (d, ff),
            "down_proj": (ff, d),
        }
        if not self.gated:
            del shapes["gate_proj"]
        return shapes

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` of each matrix of a layer as the checkpoint holds it.

        Names are those of `PROJECTIONS`, with joined ones in the place of their parts.
        """
        shapes = self.projection_shapes()
        own: dict[str, tuple[int, int]] = {}
        for fused, parts in self.fused.items():
            if fused in self.joined:
                own[JOINED[fused]] = shapes[parts[0]][0], sum(shapes[part][1] for part in parts)
            else:
                own |= {part: shapes[part] for part in parts}
        return own

    def modules_of(self, fused: str) -> tuple[str, ...]:
        """The checkpoint's modules of a fused matrix; each is quantised on its own."""
        return (JOINED[fused],) if fused in self.joined else self.fused[fused]

    def parts_of(self, module: str) -> tuple[str, ...]:
        """The projections that a module of `module_shapes` consists of."""
        return next(
            (self.fused[fused] for fused in self.joined if JOINED[fused] == module), (module,)
        )

    def place(self, module: str) -> tuple[str, int, int]:
        """A module's fused matrix, and its first row and number of rows there.

        `module` is one of `PROJECTIONS` or of `JOINED`'s values.
        """
        for fused, parts in self.fused.items():
            shapes = self.projection_shapes()
            if module == JOINED.get(fused):
                return fused, 0, sum(shapes[part][1] for part in parts)
            start = 0
            for part in parts:
                if part == module:
                    return fused, start, shapes[part][1]
                start += shapes[part][1]
        raise KeyError(module)

    def norm_widths(self) -> dict[str, int]:
        """Size of the weight of each of a layer's norms; norms that it lacks are left out."""
        hidden, each = self.hidden_size, self.qk_norm_span is not NormSpan.HEAD
        widths: dict[str, int] = {}
        if self.input_norms:
            widths["input_layernorm"] = hidden
            if not self.parallel:
                widths["post_attention_layernorm"] = hidden
        if self.qk_norm:
            widths["q_norm"] = self.q_size if each else self.head_dim
            widths["k_norm"] = self.kv_size if each else self.head_dim
        if self.output_norms:
            widths |= {"attention_output_norm": hidden, "mlp_output_norm": hidden}
        return widths


def _rope(values: Mapping[str, Any]) -> Rope:
    return Rope(tuple(values["inv_freq"]), values["scale"])


def _shown(frequencies: tuple[float, ...]) -> list[str]:
    return [f"{frequency:.4e}" for frequency in frequencies]
