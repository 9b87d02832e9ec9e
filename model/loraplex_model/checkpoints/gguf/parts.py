"""The files of one model: a single file, or the parts that `llama-gguf-split` names
NAME-00001-of-00003.gguf and so on.

The first part has the metadata. Each part states its number (`split.no`, from 0) and the number of
parts (`split.count`); together they hold `split.tensors.count` tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex_model.base.refusal import model_invalid
from loraplex_model.checkpoints.gguf.header import GgufFile, read_file, shown

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def names_of(path: Path) -> list[Path]:
    """Paths of all parts of the model to which `path` belongs by its name, the first one first.

    A file that is not named as a part stands alone.
    """
    match = _PART.fullmatch(path.name)
    if match is None or not 0 < int(match[2]) <= int(match[3]):
        return [path]
    count = int(match[3])
    return [path.with_name(_name(match[1], i, count)) for i in range(count)]


def _name(stem: str, index: int, count: int) -> str:
    return f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"


def read_parts(path: Path) -> tuple[Mapping[str, Any], Sequence[GgufFile]]:
    """Metadata of a model, and its files; `path` is any of them.

    Raises `Refusal`: MODEL_INVALID for a missing part, or parts that do not belong together.
    """
    paths = names_of(path)
    for part in paths:
        if not part.is_file():
            raise model_invalid(
                f"{part} is missing; {path.name} is one of {len(paths)} parts of a model, "
                "which must all be in one directory"
            )
    files = [read_file(part) for part in paths]
    for index, file in enumerate(files):
        _check_place(file, index, len(files))
    metadata, names = dict(files[0].metadata), set(files[0].tensors)
    for file in files[1:]:
        if twice := names & file.tensors.keys():
            raise model_invalid(f"{file.path} repeats {min(twice)} of an earlier part")
        names |= file.tensors.keys()
        for key, value in file.metadata.items():
            if not key.startswith("split.") and metadata.setdefault(key, value) != value:
                raise model_invalid(f"{file.path} has another {key} than {files[0].path.name}")
    stated = metadata.get("split.tensors.count", len(names))
    if stated != len(names):
        raise model_invalid(
            f"{files[0].path} states {shown(stated)} tensors in all parts, "
            f"but they hold {len(names)}"
        )
    return metadata, files


def _check_place(file: GgufFile, index: int, count: int) -> None:
    """Raises `Refusal` if a file is not the part that its name says."""
    parts, number = (_count(file, key) for key in ("split.count", "split.no"))
    if (parts, number) == (count, index) or max(parts, count) == 1:
        return
    named = f"part {index + 1} of {count}" if count > 1 else "a whole model"
    if parts <= 1:
        raise model_invalid(f"{file.path} is named as {named}, but it is a whole model; rename it")
    raise model_invalid(
        f"{file.path} is named as {named}, but it is part {number + 1} of {parts} (split.no, "
        f"split.count); call it {_name('NAME', number, parts)}, and the other parts alike"
    )


def _count(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key, 0)
    if not isinstance(value, int):
        raise model_invalid(f"{file.path} states {key} {shown(value)}, which is no number of parts")
    return value
