"""Reads the header of a safetensors file, strictly and within bounds.

The safetensors library accepts headers of 100 MB and 800,000 empty tensors, which takes seconds and
hundreds of megabytes before any further check could run. The format is an 8-byte little-endian
length, a JSON object of that length, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from loraplex_model.base.dtypes import ITEM_SIZES, SAFETENSORS
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.files import WEIGHTS_FILE, refused
from loraplex_adapters.format.foreign.folder import HEAD_BYTES, cause_in
from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.strict_json import loads, shown

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 8192
MAX_NAME = 512
MAX_DIMENSIONS = 8
ITEM_SIZE = {short: ITEM_SIZES[name] for short, name in SAFETENSORS.items()}

# A tensor's entry has five commas. A header with more than this is refused before it is parsed.
_MAX_COMMAS = 8 * MAX_TENSORS


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a weights file: `tensors` in the order of their offsets, without gaps."""

    tensors: tuple[TensorLocation, ...]
    metadata: Mapping[str, str]
    data_start: int


def read_header(read: Callable[[int, int], bytes], size: int) -> Header:
    """Reads and checks the header of a file of `size` bytes; `read(offset, length)` reads from it.

    Raises Refusal: ADAPTER_INVALID, or ADAPTER_UNSUPPORTED for a dtype or a pickle.
    """
    if (cause := cause_in(read(0, min(size, HEAD_BYTES)), WEIGHTS_FILE)) is not None:
        raise refused(cause)
    if size < 8:
        raise _invalid("is shorter than a safetensors header")
    prefix = read(0, 8)
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise _invalid("is truncated: its header extends beyond its end")
    if length > MAX_HEADER_BYTES:
        raise _invalid(f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
    text = read(8, length)
    if text.count(b",") > _MAX_COMMAS:
        raise _invalid(f"has a header for more than {MAX_TENSORS} tensors")
    try:
        table = loads(text)
    except ValueError as error:
        raise _invalid(f"has a header that {error}") from None
    if not isinstance(table, dict) or not text.startswith(b"{"):
        raise _invalid("has a header that is not a JSON object")
    metadata = _metadata(table.pop("__metadata__", {}))
    if not table:
        raise _invalid("has no tensors")
    if len(table) > MAX_TENSORS:
        raise _invalid(f"has {len(table)} tensors; at most {MAX_TENSORS} are accepted")
    start = 8 + length
    tensors = sorted(
        (_location(n, e, start) for n, e in table.items()), key=lambda t: (t.start, t.end)
    )
    end = start
    for tensor in tensors:
        if tensor.start != end:
            raise _invalid("has tensors that overlap or leave a gap", tensor.name)
        end = tensor.end
    if end != size:
        raise _invalid(f"has {size} bytes, but its tensors end at {end}")
    return Header(tuple(tensors), metadata, start)


def planned_header(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> tuple[Header, int]:
    """The header of a file that does not exist yet, and the size that the file would have.

    `tensors` are dtypes and shapes by name. Raises Refusal as `read_header` does.
    """
    table: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * ITEM_SIZE[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    head = len(text).to_bytes(8, "little") + text
    size = len(head) + end
    return read_header(lambda offset, length: head[offset : offset + length], size), size


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _invalid("has metadata that is not a map of strings", "__metadata__")
    return value


def _location(name: str, entry: object, data_start: int) -> TensorLocation:
    if len(name) > MAX_NAME:
        raise _invalid("has a tensor name that is too long", name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _invalid("has a tensor with other fields than dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _invalid("has a tensor whose dtype is not a string", name)
    if dtype not in ITEM_SIZE:
        supported = ", ".join(ITEM_SIZE)
        message = f"tensor {shown(name)} has dtype {shown(dtype, 16)}; supported are {supported}"
        raise Refusal(Reason.ADAPTER_UNSUPPORTED, message, shown(name))
    if not _integers(shape) or not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 0:
        raise _invalid("has a tensor whose shape is not a list of sizes", name)
    if not _integers(offsets) or len(offsets) != 2 or offsets[0] < 0:
        raise _invalid("has a tensor whose data_offsets are not a pair of offsets", name)
    begin, end = offsets
    if end - begin != prod(shape) * ITEM_SIZE[dtype]:
        raise _invalid("has a tensor whose bytes do not fit its shape", name)
    return TensorLocation(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _invalid(what: str, tensor: str = "") -> Refusal:
    where = f" ({shown(tensor)})" if tensor else ""
    return Refusal(
        Reason.ADAPTER_INVALID, f"{WEIGHTS_FILE} {what}{where}", shown(tensor) or WEIGHTS_FILE
    )
