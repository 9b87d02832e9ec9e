"""Loading a base model by its name: fetched, converted once, mapped from the cache."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import model_invalid
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints import cache, checkpoint, default_model, stored, tokenizer
from loraplex_model.checkpoints.convert import convert
from loraplex_model.checkpoints.default_model import DEFAULT, ensure_default_model
from loraplex_model.checkpoints.mapped import MappedFile
from loraplex_model.checkpoints.stored import StoredModel
from loraplex_model.ops import known_faults

DECODER = "decoder.json"


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model and the files that the front process needs.

    Attributes:
        name: the operator's name for it.
        source: directory of the checkpoint, or the GGUF file.
        directory: folder of `tokenizer.json` and `model.json` (`tokenizer.TokenizerInfo.read`).
        file: the file to which the packed codes are mapped if the weights are on the CPU. Code that
            reads them long after the start must check `file.is_intact()` first.
    """

    name: str
    weights: BaseWeights
    source: Path
    directory: Path
    file: MappedFile


def load_base(
    model: str,
    dtype: torch.dtype,
    cache_dir: Path,
    *,
    device: torch.device | str = "cpu",
) -> LoadedBase:
    """Loads a model, converting it if the cache does not have it or has it damaged.

    Every file of the cache is read and compared with its digest, which takes a second for each
    gigabyte, before the model is used.

    Args:
        model: a directory, a GGUF file, a hub id, or "default" (or "").
        dtype: type of norms, biases, embeddings and head: float32 or bfloat16.

    Raises:
        Refusal: one of `BASE_MODEL_REASONS`; the message says what to do.
    """
    kind = torch.device(device).type
    known_faults.check(kind)
    known_faults.avoid(kind)
    if model in ("", DEFAULT):
        source = ensure_default_model(cache_dir)
        digests = [default_model.SHA256]
        build = partial(_build_default, cache_dir)
    else:
        source, digests = checkpoint.locate(model), []
        build = partial(_build, source)
    files = checkpoint.files_of(source)
    if not files:
        raise model_invalid(f"{source} has neither config.json nor safetensors")
    entry = cache.entry_for(cache_dir, files, build, digests=digests)
    built = _read_decoder(entry / DECODER)
    path = entry / stored.WEIGHTS
    weights = stored.read_weights(path, built, dtype, device)
    return LoadedBase(model or DEFAULT, weights, source, entry, MappedFile(path))


def known_fingerprint(model: str, cache_dir: Path) -> str:
    """The fingerprint of a model that was converted before; "" if it has to be converted first.

    Nothing is downloaded, no weights are read, and nothing is changed. Raises `Refusal` if the
    model's files cannot be read.
    """
    if model in ("", DEFAULT):
        source, digests = cache_dir / "default" / default_model.FILE, [default_model.SHA256]
    else:
        source, digests = Path(model), []
    if not source.exists():
        return ""
    files = checkpoint.files_of(source)
    entry = cache.known_entry(cache_dir, files, digests) if files else None
    return "" if entry is None else _read_decoder(entry / DECODER).fingerprint


def _build_default(cache_dir: Path, directory: Path) -> None:
    _build(ensure_default_model(cache_dir, verify=True), directory)


def _build(source: Path, directory: Path) -> None:
    tensors = checkpoint.open_source(source)
    built = convert(tensors, directory / stored.WEIGHTS)
    text = source if tensors.has_tokenizer else None
    tokenizer.write(text, directory, built.config.architecture, built.eos_token_ids)
    (directory / DECODER).write_text(json.dumps(dataclasses.asdict(built)), "utf-8")


def _read_decoder(path: Path) -> StoredModel:
    fields = checkpoint.read_json(path)
    config = fields["config"]
    config["rope_inv_freq"] = tuple(config["rope_inv_freq"])
    config["sliding_windows"] = tuple(config["sliding_windows"])
    return StoredModel(
        DecoderConfig(**config), fields["fingerprint"], tuple(fields["eos_token_ids"])
    )
