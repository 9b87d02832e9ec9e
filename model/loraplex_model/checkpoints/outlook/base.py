"""Whether a base model would be served, and as what, found without converting it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex_model.base import families
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import Refusal, model_invalid
from loraplex_model.checkpoints import checkpoint, stored, tokenizer
from loraplex_model.checkpoints.checkpoint import TensorSource
from loraplex_model.checkpoints.conversion.survey import Survey, survey
from loraplex_model.checkpoints.convert import require_room
from loraplex_model.checkpoints.gguf.source import GgufSource
from loraplex_model.checkpoints.load import files_at, known_base, present
from loraplex_model.checkpoints.outlook.footprint import conversion_peak

_WEIGHTS = (".gguf", ".safetensors")


@dataclass(frozen=True, slots=True)
class BaseOutlook:
    """A base model that would be served, converted or not.

    Attributes:
        source: directory of the checkpoint, or the GGUF file.
        stored_as: format, types and size of the checkpoint, for people.
        nf4: bytes of the stored model.
        entry: the folder of the converted model; None if it has not been converted.
        fingerprint: that of the converted model; "" if it has not been converted.
        peak: bound on the memory of the conversion, in bytes; 0 if there is none.
        later: what only the conversion can check, each as a noun for a message.
    """

    config: DecoderConfig
    source: Path
    stored_as: str
    nf4: int
    entry: Path | None = None
    fingerprint: str = ""
    peak: int = 0
    later: tuple[str, ...] = ()

    @property
    def weights_file(self) -> str:
        """Path of the stored weights; "" if there are none."""
        return "" if self.entry is None else str((self.entry / stored.WEIGHTS).absolute())


def look(model: str, cache_dir: Path) -> BaseOutlook | None:
    """Examines a model as `load_base` would, from the headers of its files.

    Nothing is fetched and nothing is written. Returns None if the model has to be fetched before
    anything can be said of it.

    Raises:
        Refusal: what `load_base` would raise, as far as configuration, tokenizer, and the names,
            types and shapes of the tensors show it.
    """
    source = present(model, cache_dir)
    if source is None:
        return None
    known = known_base(model, cache_dir)
    if known is None:
        try:
            return _unconverted(source, cache_dir)
        except OSError as error:
            raise model_invalid(f"{source} cannot be read: {error}") from error
    found, entry = known
    return BaseOutlook(
        found.config,
        source,
        _stored_as_if_readable(source),
        (entry / stored.WEIGHTS).stat().st_size,
        entry,
        found.fingerprint,
    )


def _unconverted(source: Path, cache_dir: Path) -> BaseOutlook:
    files_at(source)
    tensors = checkpoint.open_source(source)
    found = survey(tensors, sampled=True)
    require_room(cache_dir, found.stored_bytes)
    if tensors.has_tokenizer:
        tokenizer.check(source)
    return BaseOutlook(
        found.config,
        source,
        _stored_as(tensors, source),
        found.stored_bytes,
        peak=conversion_peak(found.stored_bytes, found.largest),
        later=_later(tensors, found),
    )


def _later(tensors: TensorSource, found: Survey) -> tuple[str, ...]:
    compared = found.config.tie_embeddings and {families.EMBED, families.LM_HEAD} <= set(
        tensors.names()
    )
    return ("values", *(("whether the head equals the embeddings",) if compared else ()))


def _stored_as_if_readable(source: Path) -> str:
    try:
        return _stored_as(checkpoint.open_source(source), source)
    except (Refusal, OSError):  # the converted model is served without it
        return ""


def _stored_as(tensors: TensorSource, source: Path) -> str:
    """The format of a checkpoint, the types of its tensors by their bytes, and its files."""
    is_gguf = isinstance(tensors, GgufSource)
    files = [file for file in files_at(source) if file.suffix in _WEIGHTS]
    name = "GGUF" if is_gguf else "safetensors"
    types = tensors.types() if isinstance(tensors, GgufSource) else _types(tensors)
    size = sum(types.values())
    shown = ", ".join(f"{kind} {100 * types[kind] / size:.0f}%" for kind in _by_size(types))
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    total = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
    return f"{name} in {count}, {total}: {shown}"


def _by_size(types: Mapping[str, int]) -> list[str]:
    return sorted(types, key=lambda kind: -types[kind])


def _types(tensors: TensorSource) -> Mapping[str, int]:
    """Bytes of the tensors of each type; the parts of matrices in NF4 together."""
    types: Counter[str] = Counter()
    names = tensors.names()
    for name in names:
        matrix, _, _ = name.partition(".weight.")
        is_nf4 = f"{matrix.removesuffix('.weight')}.weight.quant_state.bitsandbytes__nf4" in names
        info = tensors.info(name)
        types["bitsandbytes NF4" if is_nf4 else info.dtype] += info.nbytes
    return types
