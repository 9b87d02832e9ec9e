"""Loading a base model by its name: fetched, converted once, mapped from the cache."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import Refusal, model_invalid
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints import cache, checkpoint, default_model, stored, tokenizer
from loraplex_model.checkpoints.convert import convert, named_ends
from loraplex_model.checkpoints.default_model import DEFAULT, ensure_default_model
from loraplex_model.checkpoints.mapped import MappedFile
from loraplex_model.checkpoints.stored import StoredModel
from loraplex_model.checkpoints.tokenizer import SpeltToken, TokenizerInfo
from loraplex_model.ops import known_faults

DECODER = "decoder.json"

_END_RULE = 1
"""Version of the rule that collects end tokens. An entry with another one has its own collected
when it is loaded."""


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
        build = partial(_build, source, cache_dir)
    files = files_at(source)
    entry = cache.entry_for(cache_dir, files, build, digests=digests)
    built = _read_decoder(entry / DECODER)
    built = dataclasses.replace(built, eos_token_ids=_end_tokens(source, entry, built))
    path = entry / stored.WEIGHTS
    weights = stored.read_weights(path, built, dtype, device)
    return LoadedBase(model or DEFAULT, weights, source, entry, MappedFile(path))


def files_at(source: Path) -> tuple[Path, ...]:
    """The files of a model. Raises `Refusal` (MODEL_INVALID) if there are none."""
    files = checkpoint.files_of(source)
    if not files:
        raise model_invalid(f"{source} has neither config.json nor safetensors")
    return files


def present(model: str, cache_dir: Path) -> Path | None:
    """The path of a model that is on this machine; None if it has to be fetched.

    Raises `Refusal` (MODEL_NOT_FOUND, MODEL_INVALID) for what can be no model.
    """
    if model in ("", DEFAULT):
        path = default_model.path_in(cache_dir)
        return path if default_model.is_pinned(path, digest=False) else None
    return checkpoint.locate_here(model)


def known_base(model: str, cache_dir: Path) -> tuple[StoredModel, Path] | None:
    """A model that was converted before, and its entry in the cache; None if it was not.

    Nothing is downloaded, no weights are read, and nothing is changed. Raises `Refusal` if the
    model's files cannot be read.
    """
    known = _known(model, cache_dir)
    return None if known is None else (_read_decoder(known[1] / DECODER), known[1])


def known_fingerprint(model: str, cache_dir: Path) -> str:
    """The fingerprint of a model that was converted before; "" if it has to be converted first.

    As for `known_base`, nothing is changed.
    """
    known = known_base(model, cache_dir)
    return "" if known is None else known[0].fingerprint


def known_end_tokens(model: str, cache_dir: Path) -> list[SpeltToken] | None:
    """The end tokens of a model that was converted before; None if it has to be converted first.

    As for `known_base`, nothing is changed.
    """
    known = _known(model, cache_dir)
    if known is None:
        return None
    ids = _end_tokens(*known, _read_decoder(known[1] / DECODER))
    return tokenizer.spellings(known[1], ids)


def _known(model: str, cache_dir: Path) -> tuple[Path, Path] | None:
    """Source and cache entry of a model that was converted before."""
    try:
        source = present(model, cache_dir)
    except Refusal:
        return None
    if source is None:
        return None
    digests = [default_model.SHA256] if model in ("", DEFAULT) else []
    files = checkpoint.files_of(source)
    entry = cache.known_entry(cache_dir, files, digests) if files else None
    return None if entry is None else (source, entry)


def _build_default(cache_dir: Path, directory: Path) -> None:
    _build(ensure_default_model(cache_dir, verify=True), cache_dir, directory)


def _build(source: Path, cache_dir: Path, directory: Path) -> None:
    tensors = checkpoint.open_source(source)
    weights = directory / stored.WEIGHTS
    built = convert(tensors, weights, name=source.name, kernels=cache_dir / "kernels")
    text = source if tensors.has_tokenizer else None
    config = built.config
    info = tokenizer.write(
        text, directory, config.architecture, built.eos_token_ids, config.vocab_size
    )
    built = dataclasses.replace(built, eos_token_ids=info.eos_token_ids)
    fields = dataclasses.asdict(built) | {"end_tokens": _END_RULE}
    (directory / DECODER).write_text(json.dumps(fields), "utf-8")


def _end_tokens(source: Path, entry: Path, built: StoredModel) -> tuple[int, ...]:
    """The tokens that end a generation.

    For an entry of an older version, which lacks some, they are collected from the source.
    """
    if checkpoint.read_json(entry / DECODER).get("end_tokens") == _END_RULE:
        return built.eos_token_ids
    size = built.config.vocab_size
    named = built.eos_token_ids
    with suppress(OSError):  # the entry is good without its source
        named = named_ends(checkpoint.open_source(source), size)
    return tokenizer.all_end_tokens(TokenizerInfo.read(entry), entry, named, size)


def _read_decoder(path: Path) -> StoredModel:
    fields = checkpoint.read_json(path)
    config = DecoderConfig.from_json(fields["config"])
    return StoredModel(config, fields["fingerprint"], tuple(fields["eos_token_ids"]))
