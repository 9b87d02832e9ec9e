"""From many findings to their causes: the cause first, and one finding for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loraplex_model.base.families import TEXT_FAMILIES
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason

from loraplex_adapters.format.foreign.folder import CONVERT
from loraplex_adapters.format.foreign.names import WAYS_OUT, Wrapper, spelling
from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.strict_json import shown

_MISTRAL = re.compile(
    r"\A(?:model\.)?layers\.[0-9]{1,5}\.(?:attention\.w[qkvo]|feed_forward\.w[123])\.lora_[AB]\."
)
_BLOCK = re.compile(r"(?:\A|\.)(?:h|blocks?|gpt_neox\.layers|encoder\.layers?)\.[0-9]{1,5}\.")
_IMAGE = ("lora_unet_", "lora_te", "unet.", "text_encoder", "diffusion_model.")
_IMAGE_BLOCKS = ("transformer_blocks.", "double_blocks.", "single_blocks.", ".lora_down.")
_OTHER_INPUTS = frozenset(
    {
        "audio_model",
        "audio_tower",
        "image_newline",
        "mm_projector",
        "multi_modal_projector",
        "vision_model",
        "vision_tower",
        "visual",
    }
)
_OF_ADAPTERS = (
    "lora_",
    "ia3_l",
    "trainable_tokens",
    "prompt_",
    "bottleneck",
    "modules_to_save",
    "hada_",
    "lokr_",
    "miss_",
    "vera_",
    "hra_",
    "deft_",
    "peanut_",
    "poly_",
)
_MAX_READ = 512
_MANY = 8
"""Findings of one kind that are joined. Fewer are listed one by one."""


@dataclass(frozen=True, slots=True)
class _Form:
    """Names that another program gives its tensors, with the finding about them."""

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
    findings: Sequence[Problem], tensors: Iterable[TensorLocation], base: BaseInfo
) -> list[Problem]:
    """The findings by cause: causes that explain many of them first, then the rest in groups.

    `tensors` are those of the weights file. A finding about a tensor has the tensor's name, as
    `shown` gives it, as its field.
    """
    fields = {finding.field for finding in findings}
    about = [tensor for tensor in tensors if shown(tensor.name) in fields]
    causes: list[Problem] = []
    gone: set[str] = set()
    found: dict[tuple[Reason, str, str], list[str]] = {}
    for tensor in about:
        if (cause := _cause(tensor.name, base)) is not None:
            found.setdefault(cause, []).append(shown(tensor.name))
    for (reason, what, way_out), names in found.items():
        message = f"names of tensors {what} ({_counted(names)}); {way_out}"
        causes.append(Problem(names[0], message, reason))
        gone.update(names)
    vocab_size = base.config.vocab_size
    hidden_size = base.config.hidden_size
    if resized := [t for t in about if _vocabulary(t, hidden_size) not in (0, vocab_size)]:
        size = _vocabulary(resized[0], hidden_size)
        causes.append(_resized([shown(t.name) for t in resized], size, vocab_size))
        gone.update(shown(tensor.name) for tensor in resized)
    rest = [finding for finding in findings if finding.field not in gone]
    return [*causes, *grouped(rest, about)]


def grouped(findings: Iterable[Problem], tensors: Iterable[TensorLocation]) -> list[Problem]:
    """The findings, with one for many that differ only in the tensor or the module.

    Findings about tensors are alike if the rest of their messages is; findings about modules, if
    they name the same option.
    """
    names = {shown(tensor.name) for tensor in tensors}
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for number, finding in enumerate(findings):
        begins = finding.message.startswith(finding.field)
        if begins and finding.field in names:
            key = ("tensors", finding.reason, finding.message.removeprefix(finding.field))
        elif begins:
            key = ("alone", finding.reason, str(number))
        else:
            key = ("option", finding.reason, finding.field)
        groups.setdefault(key, []).append(finding)
    few = (
        group if len(group) < _MANY else [_joined(group, is_tensor=key[0] == "tensors")]
        for key, group in groups.items()
    )
    return [finding for group in few for finding in group]


def led_by(field: str, findings: Iterable[Problem]) -> list[Problem]:
    """The findings, those about `field` first."""
    return sorted(findings, key=lambda finding: finding.field != field)


def _cause(name: str, base: BaseInfo) -> tuple[Reason, str, str] | None:
    """Reason, description and way out for a refused name; None if it is PEFT's own spelling."""
    name = name[:_MAX_READ]
    for form in _FORMS:
        if form.matches(name):
            return form.reason, form.what, form.way_out
    found = spelling(name)
    wrappers = found.wrappers if found else ()
    if base.config.architecture in TEXT_FAMILIES:  # `ModulePaths` takes such names
        wrappers = tuple(wrapper for wrapper in wrappers if wrapper is not Wrapper.MULTIMODAL)
    if found is None or not wrappers:
        return None
    reason = Reason.ADAPTER_INVALID
    if wrappers == (Wrapper.MULTIMODAL,):
        reason = Reason.BASE_MODEL_MISMATCH
    what = " and ".join(wrapper.value for wrapper in wrappers)
    if found.adapter:
        what += f" ({shown(found.adapter)})"
    return reason, what, f"{WAYS_OUT[wrappers[0]]}, or {CONVERT}"


def is_of_another_form(name: str) -> bool:
    """Whether a tensor's name is in another program's form, and not only spelt differently."""
    return any(form.matches(name[:_MAX_READ]) for form in _FORMS)


def _is_bare(name: str) -> bool:
    found = spelling(name)
    return found is not None and Wrapper.BARE in found.wrappers


def _vocabulary(tensor: TensorLocation, hidden_size: int) -> int:
    """The number of tokens that a tensor of embeddings or head is for; 0 for other tensors."""
    module, _, ending = tensor.name.rpartition("model.")[2].partition(".")
    if module not in ("embed_tokens", "lm_head") or len(tensor.shape) != 2:
        return 0
    first, second = tensor.shape
    if ending.startswith("lora_embedding_A"):
        return second
    if module == "lm_head" and ending.startswith("lora_B"):
        return first
    saved = ending.endswith("weight") and not ending.startswith("lora_")
    return first if saved and second == hidden_size else 0


def _resized(names: Sequence[str], size: int, vocab_size: int) -> Problem:
    more = size > vocab_size
    message = (
        f"the adapter is for a vocabulary of {size} tokens, {abs(size - vocab_size)} "
        f"{'more' if more else 'fewer'} than the {vocab_size} of this base ({_counted(names)}); "
    )
    if more:
        message += (
            "if tokens were added for training, resize the base in the same way "
            "(resize_token_embeddings, save_pretrained) and serve that, or train the rows of "
            "existing tokens only (PEFT: trainable_token_indices)"
        )
    else:
        message += (
            "serve the model that it was trained on, or, if this base is the same with a padded "
            "vocabulary, pad these tensors with the base's own last rows"
        )
    return Problem(names[0], message, Reason.BASE_MODEL_MISMATCH)


def _counted(names: Sequence[str]) -> str:
    """How many tensors, and one of their names."""
    if len(names) == 1:
        return names[0]
    return f"{len(names)} tensors, for example {names[0]}"


def _joined(group: Sequence[Problem], *, is_tensor: bool) -> Problem:
    first = group[0]
    if is_tensor:
        rest = first.message.removeprefix(first.field).lstrip()
        message = f"{len(group)} tensors: each {rest}, for example {first.field}"
    else:
        message = f"{first.message} (and {len(group) - 1} more findings like this one)"
    return Problem(first.field, message, first.reason)
