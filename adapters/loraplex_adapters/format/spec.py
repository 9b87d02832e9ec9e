"""An adapter whose files have been checked, and the limits that it was checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_model.base.config import Site


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Limits that an adapter must not exceed. Sizes are in bytes.

    Attributes:
        max_rank: rank of any module.
        max_weights_bytes: size of the weights file.
        max_device_bytes: packed size in the base's dtype; None for no limit.
        max_virtual_tokens: number of virtual tokens.
        max_context: longest sequence that is computed, virtual tokens included; None for the base's
            number of positions, which is the limit in any case.
        max_scale: |scale| of any module, such as |alpha / r|.
        max_abs_value: |element| of any tensor; the default is float16's largest number.
        max_decompositions: work for singular vectors of the base's matrices at each load: the sum
            of k * k * (k + m) over matrices of k by m, k <= m. The default is 100 s of one core.
    """

    max_rank: int = 256
    max_weights_bytes: int = 4 << 30
    max_device_bytes: int | None = None
    max_virtual_tokens: int = 1024
    max_context: int | None = None
    max_scale: float = 1e4
    max_abs_value: float = 65504.0
    max_decompositions: float = 5e11


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Place of a tensor in the weights file.

    Attributes:
        dtype: "F32", "F16" or "BF16", as in safetensors.
        start, end: byte offsets from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Fold:
    """How the tensors of a module become A [rank, fan_in] and B [fan_out, rank].

    Attributes:
        arithmetic: name of the function in `load.folded` that computes A and B.
        fan_in, fan_out: widths of the module's input and output.
        settings: numbers in the configuration that the arithmetic needs, by name.
    """

    arithmetic: str
    fan_in: int
    fan_out: int
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """The part of an adapter at one site of the model.

    Attributes:
        layer, module: the site, as in `loraplex_model.base.config.Site`; virtual tokens are at
            (MODEL, "virtual_tokens").
        tensors: places in the file by role, in PEFT's shapes:
            a [r, in], b [out, r]: LoRA; at embed_tokens a [r, vocab], b [hidden, r];
            e [r, 1]: AdaLoRA's singular values, which multiply a;
            b_bias [out]: bias of lora_B, scaled as B is;
            magnitude [out]: DoRA;
            out_gain [out, 1], in_gain [1, in]: IA3;
            bias [out]: replaces the base's; bias_delta [1, out]: is added to the base's;
            weight: replaces the base's: [width] of a norm, [vocab, hidden] of head or embeddings;
                a and b at the same module act on top of it;
            rows [n, hidden]: replace the rows `token_ids` of embeddings or head, or of `weight`;
            down [width, in], down_bias [width], up [out, width], up_bias [out]: a bottleneck;
            prompt [n, hidden]: virtual tokens as embeddings; task_cols [n, ranks] and
            task_rows [ranks, hidden], whose product they are multiplied by, element by element;
            prefix [n, 2 * layers * kv_size]: virtual tokens as keys and values;
            any other role: a tensor that `fold` reads, named as in PEFT.
        rank: rank of LoRA's matrices, also if they are folded, or width of a bottleneck; 0 for
            other roles.
        scale: factor of B (A x), or of a bottleneck's output.
        token_ids: token ids of `rows`, in the order of the rows; distinct, not sorted.
        changed_rows: token ids of the rows of `weight` that differ from the base's, ascending;
            empty if all may differ.
        activation, reads: names of a bottleneck's `Activation` and `Reads` of
            `loraplex_model.adapters.delta`, in lower case; else "".
        fold: how A and B are computed from the tensors; None if they are tensors of the file.
    """

    layer: int
    module: str
    tensors: Mapping[str, TensorLocation]
    rank: int = 0
    scale: float = 1.0
    token_ids: tuple[int, ...] = ()
    activation: str = ""
    reads: str = ""
    changed_rows: tuple[int, ...] = ()
    fold: Fold | None = None


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A tensor that may equal the base's own weight; `format.copies` decides what it means.

    Attributes:
        site: the module whose weight in the base it is compared with.
        sites: the modules whose weight it replaces if it differs.
        refusal: why the file is refused if it differs; "" if it is not.
        replaced_by: name of the tensor that sets the same weight after it; "" if none does.
    """

    tensor: TensorLocation
    site: Site
    sites: tuple[Site, ...]
    refusal: str = ""
    replaced_by: str = ""


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """A checked adapter. `modules` covers every tensor of the weights file that has an effect.

    Attributes:
        digest: "sha256:<64 hex digits>" over the bytes of configuration and weights.
        peft_type: PEFT's name of the kind, or "BOTTLENECK".
        rank: the largest rank of the modules; 0 for kinds without ranks.
        target_modules: the names of the changed modules, each once, in the order of the model.
        modules: the parts of the adapter, in the order of the adapter table.
        size_bytes: size of the weights file.
        base_model: name of the base in the configuration; informational, may be "".
        virtual_tokens: number of virtual tokens, which take positions of the prompt.
        invocation_tokens: token ids from whose last occurrence in the prompt on the adapter acts,
            while the base alone computes the tokens before; () if it acts on all tokens.
        provenance: the trainer's stamps by key ("base_fingerprint", "data_sha256", "trainer",
            "peft_version", ...); informational.
        packed_bytes: bytes on the device in the base's dtype, including padding.
        copies: tensors to compare with the base's own weights, and twins: pairs of tensors that
            must be equal. Until they are compared, `modules` has each copy as a replaced weight.
        notes: sentences for the adapter's owner, such as which tensors are not used.
    """

    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    modules: tuple[ModuleSpec, ...]
    size_bytes: int
    base_model: str
    virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    packed_bytes: int = 0
    copies: tuple[BaseCopy, ...] = ()
    twins: tuple[tuple[TensorLocation, TensorLocation], ...] = ()
    notes: tuple[str, ...] = ()
