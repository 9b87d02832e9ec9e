"""From many findings to their causes: the cause first, and one finding for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loraplex_model.base.refusal import Problem, Reason

from loraplex_adapters.format.foreign.folder import CONVERT
from loraplex_adapters.format.foreign.names import WAYS_OUT, Wrapper, spelling
from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.strict_json import shown

_LAYER = re.compile(r"\blayers\.[0-9]{1,5}\.")
_MISTRAL = re.compile(
    r"\A(?:model\.)?layers\.[0-9]{1,5}\.(?:attention\.w[qkvo]|feed_forward\.w[123])\.lora_[AB]\."
)
_BLOCK = re.compile(r"(?:\A|\.)(?:h|blocks?|gpt_neox\.layers|encoder\.layers?)\.[0-9]{1,5}\.")
_IMAGE = ("lora_unet_", "lora_te", "unet.", "text_encoder", "diffusion_model.")
_IMAGE_BLOCKS = ("transformer_blocks.", "double_blocks.", "single_blocks.", ".lora_down.")
_OTHER_INPUTS = frozenset(
    "vision_tower vision_model visual audio_tower audio_model multi_modal_projector "
    "mm_projector image_newline".split()
)
_OF_ADAPTERS = ("lora_", "ia3_l", "trainable_tokens", "prompt_", "bottleneck", "modules_to_save")
_MAX_READ = 512


@dataclass(frozen=True, slots=True)
class _Form:
    """Names of another program: which they are, and what to say about them."""

    matches: Callable[[str], bool]
    reason: Reason
    what: str
    way_out: str


_FORMS = (
    _Form(
        lambda name: name.endswith((".lora_a", ".lora_b")),
        Reason.ADAPTER_UNSUPPORTED,
        "are MLX's",
        CONVERT,
    ),
    _Form(
        lambda name: _MISTRAL.match(name) is not None,
        Reason.ADAPTER_UNSUPPORTED,
        "are those of mistral-finetune",
        CONVERT,
    ),
    _Form(
        lambda name: name.endswith((".lora_a.weight", ".lora_b.weight", ".magnitude")),
        Reason.ADAPTER_UNSUPPORTED,
        "are torchtune's",
        "save with torchtune's Hugging Face checkpointer, which also writes PEFT's files",
    ),
    _Form(
        lambda name: name.startswith(_IMAGE) or any(part in name for part in _IMAGE_BLOCKS),
        Reason.BASE_MODEL_MISMATCH,
        "belong to a model of images",
        "give an adapter of a language model",
    ),
    _Form(
        lambda name: not _OTHER_INPUTS.isdisjoint(name.split(".")),
        Reason.BASE_MODEL_MISMATCH,
        "belong to the part of a multimodal model that reads images or sound",
        "this base has text only: train the language model's layers alone",
    ),
    _Form(
        lambda name: ".experts." in name,
        Reason.BASE_MODEL_MISMATCH,
        "belong to a mixture of experts",
        "this base has no experts: serve the model that the adapter was trained on",
    ),
    _Form(
        lambda name: "transformer.h." in name and ("attn.attn" in name or ".qkv." in name),
        Reason.ADAPTER_UNSUPPORTED,
        "are LitGPT's",
        "merge the adapter with LitGPT and serve the merged model, or train it with PEFT",
    ),
    _Form(
        lambda name: _BLOCK.search(name) is not None,
        Reason.BASE_MODEL_MISMATCH,
        "are those of another architecture",
        "serve the model that the adapter was trained on",
    ),
    _Form(
        lambda name: not any(word in name for word in _OF_ADAPTERS) and _is_bare(name),
        Reason.ADAPTER_UNSUPPORTED,
        "are those of a whole model and not of an adapter",
        "give the folder that PEFT's save_pretrained wrote before merging, or serve the model",
    ),
)
"""Forms of other programs. The first that matches a name decides."""


def explained(
    findings: Sequence[Problem], tensors: Iterable[TensorLocation], vocab_size: int
) -> list[Problem]:
    """The findings by cause: causes that explain many of them first, then the rest in groups.

    `tensors` are those of the weights file, `vocab_size` is the base's. A finding about a tensor
    has the tensor's name, as `shown` gives it, as its field.
    """
    fields = {finding.field for finding in findings}
    about = [tensor for tensor in tensors if shown(tensor.name) in fields]
    causes: list[Problem] = []
    gone: set[str] = set()
    found: dict[tuple[Reason, str, str], list[str]] = {}
    for tensor in about:
        if (cause := _cause(tensor.name)) is not None:
            found.setdefault(cause, []).append(shown(tensor.name))
    for (reason, what, way_out), names in found.items():
        message = f"names of tensors {what} ({_counted(names)}); {way_out}"
        causes.append(Problem(names[0], message, reason))
        gone.update(names)
    if resized := [t for t in about if _vocabulary(t) not in (0, vocab_size)]:
        causes.append(_resized(resized, vocab_size))
        gone.update(shown(tensor.name) for tensor in resized)
    return [*causes, *grouped([f for f in findings if f.field not in gone])]


def grouped(findings: Iterable[Problem]) -> list[Problem]:
    """The findings in order, with one for all that differ only in the tensor or the layer."""
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for finding in findings:
        subject, rest = _split(finding)
        groups.setdefault((finding.reason, bool(subject), _LAYER.sub("", rest)), []).append(finding)
    return [_joined(group) if len(group) > 1 else group[0] for group in groups.values()]


def led_by(field: str, findings: Iterable[Problem]) -> list[Problem]:
    """The findings, those about `field` first."""
    return sorted(findings, key=lambda finding: finding.field != field)


def _cause(name: str) -> tuple[Reason, str, str] | None:
    """Reason, description and way out for a refused name; None if it is PEFT's own spelling."""
    name = name[:_MAX_READ]
    for form in _FORMS:
        if form.matches(name):
            return form.reason, form.what, form.way_out
    found = spelling(name)
    if found is None or not found.wrappers:
        return None
    reason = Reason.ADAPTER_INVALID
    if found.wrappers == (Wrapper.MULTIMODAL,):
        reason = Reason.BASE_MODEL_MISMATCH
    what = " and ".join(wrapper.value for wrapper in found.wrappers)
    if found.adapter:
        what += f" ({shown(found.adapter)})"
    return reason, what, f"{WAYS_OUT[found.wrappers[0]]}, or {CONVERT}"


def _is_bare(name: str) -> bool:
    found = spelling(name)
    return found is not None and Wrapper.BARE in found.wrappers


def _vocabulary(tensor: TensorLocation) -> int:
    """The number of tokens that a tensor of embeddings or head is for; 0 for other tensors."""
    module, _, ending = tensor.name.rpartition("model.")[2].partition(".")
    if module not in ("embed_tokens", "lm_head") or len(tensor.shape) != 2:
        return 0
    if ending.startswith("lora_embedding_A"):
        return tensor.shape[1]
    rows = ending.startswith(("lora_B", "base_layer")) and module == "lm_head"
    saved = ending in ("weight", "base_layer.weight") or ending.startswith("modules_to_save")
    return tensor.shape[0] if rows or saved else 0


def _resized(tensors: Sequence[TensorLocation], vocab_size: int) -> Problem:
    size = _vocabulary(tensors[0])
    names = [shown(tensor.name) for tensor in tensors]
    message = (
        f"the adapter is for a vocabulary of {size} tokens; this base has {vocab_size} "
        f"({_counted(names)})"
    )
    if size > vocab_size:
        message += (
            "; if tokens were added for training (resize_token_embeddings), save the base with "
            "them and serve that, or train without new tokens"
        )
    else:
        message += "; serve the model that the adapter was trained on"
    return Problem(names[0], message, Reason.BASE_MODEL_MISMATCH)


def _counted(names: Sequence[str]) -> str:
    """How many tensors, and one of their names."""
    if len(names) == 1:
        return names[0]
    return f"{len(names)} tensors, for example {names[0]}"


def _split(finding: Problem) -> tuple[str, str]:
    """The tensor or module that a message begins with, and the rest; "" if it begins otherwise."""
    subject, _, rest = finding.message.partition(" ")
    is_subject = subject == finding.field or _LAYER.search(subject[:_MAX_READ]) is not None
    return (subject, rest) if is_subject and rest else ("", finding.message)


def _joined(group: Sequence[Problem]) -> Problem:
    first = group[0]
    subjects = dict.fromkeys(_split(finding)[0] for finding in group)
    subject, rest = _split(first)
    if not subject or len(subjects) == 1:
        message = f"{first.message} (and {len(group) - 1} more of this kind)"
        return Problem(first.field, message, first.reason)
    kind = "tensors" if ".lora_" in subject or subject.endswith(".weight") else "modules"
    message = f"{len(subjects)} {kind}: each {rest}, for example {subject}"
    return Problem(first.field, message, first.reason)
