"""Converts bottleneck adapters of AdapterHub's library `adapters` for Llama, Mistral and Qwen.

In these decoders a block's output h is added to the residual stream r. In version 1.3 the library
computes A(x) = scaling * up(f(down(x))), with both biases and no layer norm after the block, where

    sequential, original_ln_before        x = h + r   Pfeiffer's `seq_bn`; here reads "stream"
    sequential, not original_ln_before    x = h       Houlsby's `double_seq_bn`; reads "output"
    parallel (`par_bn`)                   x = r       before the norm; reads "incoming"

The result is A(x) + h + r exactly if `original_ln_after` adds r and the adapter's own residual is
h, or if that residual is already h + r and `original_ln_after` is off. With other flags the library
itself loses r or adds it twice. They are refused, as is every option not described here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from loraplex_model.base.durable import flush_file
from loraplex_model.base.families import FAMILIES
from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_adapters.convert.export.directory import write_json
from loraplex_adapters.format.config import load_config
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, RegularFile, open_directory
from loraplex_adapters.format.header import Header, read_header
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.strict_json import shown

SOURCE_WEIGHTS = "adapter.safetensors"
MAX_BYTES = 4 << 30

_MODELS = tuple(family.model_type for family in FAMILIES.values())
_PICKLED = ("pytorch_adapter.bin",)
_HEADS = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
_PIECE = 4 << 20

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leaky_relu": "leaky_relu",
    "leakyrelu": "leaky_relu",
    "linear": "linear",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_BEFORE_VERSIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Meaning of the names in files of library versions that did not record their version."""

_OFF: Mapping[str, str] = {
    "cross_adapter": "adapters after cross attention",
    "inv_adapter": "invertible adapters at the embeddings",
    "ln_after": "an additional layer norm after the adapter",
    "ln_before": "an additional layer norm before the adapter",
    "phm_layer": "hypercomplex layers (Compacter)",
    "use_gating": "a gate that averages over the whole sequence",
}
"""Options that must be off, with the feature that each turns on."""

_BLOCKS = {
    "attention_adapters": ("self_attn", "attention"),
    "output_adapters": ("mlp", "mlp"),
}
_TENSORS = {
    "adapter_down.0.weight": "bottleneck_down.weight",
    "adapter_down.0.bias": "bottleneck_down.bias",
    "adapter_up.weight": "bottleneck_up.weight",
    "adapter_up.bias": "bottleneck_up.bias",
}
_NAME = re.compile(
    r"\A(?:model\.)?layers\.(0|[1-9][0-9]{0,4})\.(attention_adapters|output_adapters)\."
    r"adapters\.([^.]{1,128})\.(.{1,64})\Z"
)


def convert(source: Path, target: Path) -> None:
    """Converts an AdapterHub directory; writes the result to the new directory `target`.

    The result has not been checked against a base. Raises Refusal with all problems:
    ADAPTER_UNSUPPORTED if the conversion would not be exact or the weights are pickled,
    ADAPTER_INVALID, ADAPTER_TOO_LARGE; FIELD_INVALID for the paths.
    """
    findings: list[Problem] = []
    with open_directory(source) as directory:
        present = [name for name in (*_PICKLED, *_HEADS) if (source / name).exists()]
        for name in present:
            findings.append(Problem(name, _present(name), Reason.ADAPTER_UNSUPPORTED))
        if any(name in _PICKLED for name in present):
            raise Refusal.of(tuple(findings))
        config, left_out = _read_config(directory.read_config(), findings)
        with directory.open(SOURCE_WEIGHTS, MAX_BYTES) as weights:
            header = _read_header(weights)
            renamed, held = _rename(header, findings)
            if config["scaling"] is not None:
                _check_layers(held, config["placements"], left_out, findings)
            if findings:
                raise Refusal.of(tuple(findings))
            widths = {t.shape[0] for n, t in renamed.items() if n.endswith("_down.weight")}
            config["bottleneck_size"] = widths.pop() if len(widths) == 1 else None
            _write(target, config, renamed, weights, header)


def _present(name: str) -> str:
    if name in _PICKLED:
        return f"the weights are pickled ({name}); save them with use_safetensors=True"
    return f"{name} holds a trained head, which cannot be imported; save with with_head=False"


def _read_config(data: bytes, findings: list[Problem]) -> tuple[dict[str, Any], frozenset[int]]:
    """The configuration in this project's format but for the widths, and the layers left out.

    A scaling that cannot be read is None, with a finding.
    """
    outer = load_config(data)
    inner = outer.get("config")
    if not isinstance(inner, dict):
        message = f"{CONFIG_FILE} is not AdapterHub's: it has no object `config`"
        raise Refusal(Reason.ADAPTER_INVALID, message, CONFIG_FILE)
    about, reader = Reader(outer), Reader(inner)
    if (model := about.text("model_type")) not in _MODELS:
        message = f"is {shown(model)}; only {', '.join(_MODELS)} can be imported"
        about.unsupported("model_type", message)
    if inner.get("architecture") is not None:
        reader.unsupported("architecture", "is not a plain bottleneck")
    for key, meaning in _OFF.items():
        if inner.get(key) not in (None, False):
            reader.unsupported(key, f"is set: {meaning}, which is not supported")
    reads = _reads(reader)
    scaling = reader.config.get("scaling", 1.0)
    if isinstance(scaling, str):
        reader.unsupported("scaling", "is a trained parameter; only a number is supported")
        scaling = 1.0
    factor = reader.as_number("scaling", scaling)
    word = reader.text("non_linearity").lower()
    if "version" not in outer:
        word = _BEFORE_VERSIONS.get(word, word)
    if word not in _ACTIVATIONS:
        reader.unsupported("non_linearity", f"is {shown(word)}, which is not supported")
    flags = {"attention": reader.flag("mh_adapter"), "mlp": reader.flag("output_adapter")}
    placements = [name for name, there in flags.items() if there]
    if not placements:
        reader.invalid("output_adapter", "is off, and so is mh_adapter: there is no adapter")
    base_model = about.text("model_name")
    layers = inner.get("leave_out") or []
    left_out = frozenset(reader.token_ids("leave_out", layers) or ()) if layers else frozenset()
    findings += about.findings + reader.findings
    config = {
        "base_model_name_or_path": base_model,
        "loraplex_imported_from": "adapterhub",
        "non_linearity": _ACTIVATIONS.get(word),
        "peft_type": "BOTTLENECK",
        "placements": placements,
        "reads": reads,
        "scaling": factor,
        "task_type": "CAUSAL_LM",
    }
    return config, left_out


def _reads(reader: Reader) -> str:
    """The adapter's input x: "incoming", "stream" or "output"; see the module's docstring."""
    if reader.flag("is_parallel"):
        if reader.config.get("original_ln_after", True) is not True:
            reader.unsupported("original_ln_after", "is off, which drops the residual stream")
        return "incoming"
    before = reader.flag("original_ln_before")
    after = reader.config.get("original_ln_after", True)
    residual = reader.config.get("residual_before_ln", True)
    if not isinstance(residual, bool) or not isinstance(after, bool):
        key = "original_ln_after" if isinstance(residual, bool) else "residual_before_ln"
        reader.unsupported(key, "is no boolean; the library cannot run it in these models either")
    elif after == (before and not residual):
        reader.unsupported(
            "original_ln_after",
            f"is {str(after).lower()}, which in these models "
            f"{'adds the residual stream twice' if after else 'drops the residual stream'}",
        )
    return "stream" if before else "output"


def _read_header(weights: RegularFile) -> Header:
    try:
        return read_header(weights.read, weights.size)
    except Refusal as error:
        found = (f.message.replace(WEIGHTS_FILE, SOURCE_WEIGHTS) for f in error.problems)
        raise Refusal(error.reason, next(found), SOURCE_WEIGHTS) from None


def _rename(
    header: Header, findings: list[Problem]
) -> tuple[dict[str, TensorLocation], set[tuple[int, str]]]:
    """The tensors by their names in this project's format, and the layers and placements held."""
    renamed: dict[str, TensorLocation] = {}
    held: set[tuple[int, str]] = set()
    adapters: set[str] = set()
    for tensor in header.tensors:
        name = shown(tensor.name)
        found = _NAME.match(tensor.name)
        if found is None or found[4] not in _TENSORS:
            message = f"{name} is not a tensor of a plain bottleneck adapter"
            findings.append(Problem(name, message, Reason.ADAPTER_UNSUPPORTED))
            continue
        block, placement = _BLOCKS[found[2]]
        adapters.add(found[3])
        held.add((int(found[1]), placement))
        path = f"base_model.model.model.layers.{found[1]}.{block}.{_TENSORS[found[4]]}"
        renamed[path] = tensor
    if len(adapters) > 1:
        message = f"{SOURCE_WEIGHTS} contains more than one adapter"
        findings.append(Problem(SOURCE_WEIGHTS, message, Reason.ADAPTER_UNSUPPORTED))
    return renamed, held


def _check_layers(
    held: set[tuple[int, str]],
    placements: Sequence[str],
    left_out: frozenset[int],
    findings: list[Problem],
) -> None:
    """Checks that the layers up to the last one have weights, except those that are left out."""
    layers = range(1 + max((layer for layer, _ in held), default=-1))
    taken = (layer for layer in layers if layer not in left_out)
    expected = set(product(taken, placements))
    if wrong := sorted(held ^ expected):
        layer, placement = wrong[0]
        what = "has no weights" if wrong[0] in expected else "has weights"
        message = f"layer {layer} {what} at its {placement}, against the configuration"
        findings.append(Problem(SOURCE_WEIGHTS, message, Reason.ADAPTER_INVALID))


def _write(
    target: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, TensorLocation],
    weights: RegularFile,
    header: Header,
) -> None:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        offsets = [tensor.start - header.data_start, tensor.end - header.data_start]
        table[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    try:
        target.mkdir()
        with open(target / WEIGHTS_FILE, "xb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(header.data_start, weights.size, _PIECE):
                out.write(weights.read(start, min(_PIECE, weights.size - start)))
            flush_file(out)
        write_json(target / CONFIG_FILE, config)
    except OSError as error:
        message = f"the converted adapter cannot be written: {error.strerror}"
        raise Refusal(Reason.FIELD_INVALID, message, "target") from None
