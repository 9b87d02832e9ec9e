"""An adapter whose files have been checked, and the limits that it was checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What an adapter may ask for. Sizes are bytes.

    Attributes:
        max_rank: the largest rank of any module.
        max_weights_bytes: size of the weights file.
        max_virtual_tokens: positions before the prompt that an adapter may take.
        max_device_bytes: packed size in the base's dtype; None leaves it unchecked.
        max_scale: largest |alpha / r|.
        max_abs_value: largest |element| of any tensor; the default is float16's largest number.
    """

    max_rank: int = 256
    max_weights_bytes: int = 4 << 30
    max_device_bytes: int | None = None
    max_virtual_tokens: int = 1024
    max_scale: float = 1e4
    max_abs_value: float = 65504.0


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor lies in the weights file.

    `start` and `end` are byte offsets from the beginning of the file; `dtype` is safetensors' word:
    "F32", "F16" or "BF16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """What the file holds for one site of the model.

    Attributes:
        layer, module: the site, as `loraplex_model.base.config.Site` spells it; the adapter's
            virtual tokens are at (MODEL, "virtual_tokens").
        tensors: by role, in PEFT's shapes:
            a [r, in], b [out, r]: LoRA; at embed_tokens a [r, vocab], b [hidden, r];
            e [r, 1]: AdaLoRA's singular values, multiplied onto a;
            b_bias [out]: the bias beside lora_B, scaled as B is;
            magnitude [out]: DoRA;
            out_gain, in_gain: IA3, [out, 1] and [1, in];
            bias [out]: takes the place of the base's; bias_delta [1, out] or [out]: is added to it;
            weight: takes the base's place: a norm's [width], head and embeddings [vocab, hidden];
            rows [n, hidden]: take the place of the rows `token_ids` of embeddings or head;
            down [width, in], down_bias [width], up [out, width], up_bias [out]: a bottleneck;
            prompt [n, hidden]: virtual tokens as embeddings;
            prefix [n, 2 * layers * kv_size]: virtual tokens as keys and values.
        rank: of LoRA's matrices, or a bottleneck's width; 0 elsewhere.
        scale: on B (A x), or on a bottleneck's output.
        token_ids: of the tensor's rows, in their order; each once, not sorted.
        activation, reads: a bottleneck's; names of `Activation` and `Reads` of
            `loraplex_model.adapters.delta`, in lower case.
    """

    layer: int
    module: str
    tensors: Mapping[str, TensorLocation]
    rank: int = 0
    scale: float = 1.0
    token_ids: tuple[int, ...] = ()
    activation: str = ""
    reads: str = ""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A checked adapter. Everything that its weights file holds, and that acts, is in `modules`.

    Attributes:
        digest: "sha256:<64 hex digits>" over the configuration and the weights, byte for byte.
        peft_type: PEFT's name of the kind, or "BOTTLENECK".
        rank: the largest of the modules' ranks; 0 for kinds that have none.
        target_modules: the modules that it changes, each once, in the order of the model.
        modules: by site, in the order of the adapter table.
        size_bytes: size of the weights file.
        base_model: what the configuration says it was trained on; informational, may be "".
        virtual_tokens: how many positions of a prompt it takes.
        provenance: what the trainer stamped into the file, by key ("base_fingerprint",
            "data_sha256", "trainer", "peft_version", ...); informational.
        packed_bytes: bytes on the device in the base's dtype, padding included.
    """

    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    modules: tuple[ModuleSpec, ...]
    size_bytes: int
    base_model: str
    virtual_tokens: int = 0
    provenance: Mapping[str, str] = field(default_factory=dict)
    packed_bytes: int = 0
