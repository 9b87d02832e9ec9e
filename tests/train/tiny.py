"""A tiny NF4 base and, beside it, PEFT over transformers on the same weights, unpacked to float32.

Both sides train with torch's own optimiser on the same examples; PEFT's is what is expected.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import safetensors.torch
import torch
from families import variants
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_model.ops.linear import DenseLinear
from loraplex_training import methods
from loraplex_training.data.samples import IGNORED, MicroBatch, Sample
from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.spec.spec import MethodSpec
from loraplex_training.step.joint import JointPass, Part
from model.passes import token_ids

from model import tiny

LENGTHS = (9, 14, 6)
PROMPT = (5, 3, 9, 7, 1, 4, 2, 20, 31, 8)
"""A prompt for comparisons of logits."""


@cache
def _root() -> Any:
    return tempfile.TemporaryDirectory()


@cache
def checkpoint(variant: str) -> Path:
    """The unquantised model as transformers saves it."""
    write = variants.write if variant in variants.VARIANTS else tiny.write
    return write(variant, Path(_root().name) / variant)


@cache
def base(variant: str = "llama") -> BaseWeights:
    """The NF4 base that we train on."""
    cached = Path(_root().name) / "cache"
    return load_base(str(checkpoint(variant)), torch.float32, cached).weights


@cache
def joint(variant: str = "llama") -> JointPass:
    """Passes over it, matrices unpacked once: they are tiny and the steps are many."""
    return JointPass(base(variant), DenseLinear())


@cache
def _model(variant: str) -> Any:
    if variant in variants.VARIANTS:
        return variants.rounded(variants.build(variant))
    return tiny.oracle(variant)


def model(variant: str = "llama") -> Any:
    """A fresh transformers model with the same weights."""
    return copy.deepcopy(_model(variant))


def setting(variant: str = "llama", *, steps: int = 20, seed: int = 0) -> Setting:
    """What a method is made for. The ids of a text are its bytes."""
    chance = torch.Generator().manual_seed(seed)
    return Setting(base(variant), "tiny", chance, steps, lambda text: list(text.encode()))


def make(
    method: str, variant: str = "llama", *, steps: int = 20, seed: int = 0, **options: object
) -> TrainedAdapter:
    """A trained adapter, not prepared."""
    return methods.make(MethodSpec(method, options), setting(variant, steps=steps, seed=seed))


def with_peft(config: peft.PeftConfig, variant: str = "llama") -> Any:
    """A fresh model with an untrained adapter of PEFT, without dropout's mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model(variant), config).eval()


def batch(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> MicroBatch:
    """Random examples; of each the first third is a prompt, which is not learned."""
    samples = []
    for i, length in enumerate(lengths):
        ids = token_ids(100 * seed + i, length, tiny.VOCAB)
        learned = tuple(t >= max(1, length // 3) for t in range(length))
        samples.append(Sample(tuple(ids), learned, max(1, length // 3), "", i + 1))
    return MicroBatch.of(samples)


def batches(count: int, lengths: Sequence[int] = LENGTHS) -> list[MicroBatch]:
    """`count` different ones."""
    return [batch(seed, lengths) for seed in range(count)]


def padded(examples: MicroBatch) -> dict[str, torch.Tensor]:
    """The same for transformers: `input_ids`, `attention_mask` and `labels`, padded right."""
    spans = list(pairwise(examples.starts))
    shape = len(spans), max(end - start for start, end in spans)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, (start, end) in enumerate(spans):
        ids[row, : end - start] = examples.tokens[start:end]
        mask[row, : end - start] = 1
        labels[row, 1 : end - start] = examples.targets[start : end - 1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def our_loss(adapter: TrainedAdapter, examples: MicroBatch, variant: str = "llama") -> float:
    """Mean loss of a batch, penalty included; gradients are added to the parameters."""
    part = Part(adapter, examples, 1 / examples.learned)
    loss = joint(variant).backward([part])[0] / examples.learned
    penalty = adapter.penalty()
    if penalty is not None:
        penalty.backward()
        loss += float(penalty.detach())
    return loss


def our_losses(
    adapter: TrainedAdapter,
    examples: Sequence[MicroBatch],
    lr: float = 1e-3,
    variant: str = "llama",
    after: int = 0,
) -> list[float]:
    """Losses of AdamW steps, one for each batch, with the adapter's own groups.

    `after` steps have been taken before.
    """
    groups = [
        {"params": [adapter.parameters[name] for name in group.names], "lr": lr * group.rate}
        for group in adapter.groups()
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    losses = []
    for step, one in enumerate(examples, after + 1):
        losses.append(our_loss(adapter, one, variant))
        optimiser.step()
        adapter.stepped(step)
        optimiser.zero_grad()
    return losses


def their_losses(
    model: Any,
    examples: Sequence[MicroBatch],
    lr: float = 1e-3,
    optimiser: torch.optim.Optimizer | None = None,
) -> list[float]:
    """The same of a PEFT model, AdaLoRA's allocation included."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = optimiser or torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for step, one in enumerate(examples, 1):
        loss = model(**padded(one)).loss
        loss.backward()
        optimiser.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def their_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What PEFT trains, by the names that its files have."""
    return {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def share(adapter: TrainedAdapter, model: Any) -> None:
    """Gives PEFT's parameters our values; both must have the same names and shapes."""
    theirs = their_parameters(model)
    assert theirs.keys() == adapter.parameters.keys()
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            assert theirs[name].shape == parameter.shape
            theirs[name].copy_(parameter)


def disturb(adapter: TrainedAdapter, size: float = 0.05, seed: int = 7) -> None:
    """Adds noise to every parameter."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, Euclidean."""
    return float((found - wanted).norm() / wanted.norm())


def save(adapter: TrainedAdapter, directory: Path) -> Path:
    """Writes its files as they would be published."""
    files = adapter.files()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(files.config))
    safetensors.torch.save_file(dict(files.tensors), directory / "adapter_model.safetensors")
    return directory


def opened_by_peft(directory: Path, variant: str = "llama") -> Any:
    """PEFT's model with the saved adapter; fails if a tensor is missing or left over."""
    results = []
    load_adapter = peft.PeftModel.load_adapter

    def recorded(*args: Any, **kwargs: Any) -> Any:
        results.append(load_adapter(*args, **kwargs))
        return results[-1]

    with (
        mock.patch.object(peft.PeftModel, "load_adapter", recorded),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(model(variant), directory).eval()
    assert len(results) == 1
    # PEFT loads virtual tokens apart from the rest, strictly, and then calls them left over.
    assert not set(results[0].unexpected_keys) - {"prompt_embeddings"}
    assert not [name for name in results[0].missing_keys if ".default" in name]
    return loaded


def opened_by_us(directory: Path, variant: str = "llama") -> AdapterDelta:
    """What the server makes of the saved adapter."""
    digest = inspect(directory, base(variant).info, AdapterLimits()).digest
    return load(directory, digest, base(variant))[1]


def our_logits(
    delta: AdapterDelta | None, variant: str = "llama", tokens: Sequence[int] = PROMPT
) -> torch.Tensor:
    """float32 [T, vocab]; None is the bare base."""
    return joint(variant).logits(delta, tokens)


def their_logits(model: Any, tokens: Sequence[int] = PROMPT) -> torch.Tensor:
    """The same of a model of transformers or PEFT, virtual tokens' own rows left out."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)])).logits[0]
    return logits[-len(tokens) :]


def same_after_restoring(adapter: TrainedAdapter, other: TrainedAdapter) -> None:
    """Puts all that `adapter` is into `other`, by way of its state."""
    other.restore({name: tensor.clone() for name, tensor in adapter.state().items()})
    with torch.no_grad():
        for name, parameter in other.parameters.items():
            parameter.copy_(adapter.parameters[name])


def files_are_equal(one: TrainedAdapter, other: TrainedAdapter) -> bool:
    """Whether they would be saved to the same bytes."""
    a, b = one.files(), other.files()
    same: Mapping[str, torch.Tensor] = b.tensors
    return (
        a.config == b.config
        and a.tensors.keys() == same.keys()
        and all(torch.equal(tensor, same[name]) for name, tensor in a.tensors.items())
    )
