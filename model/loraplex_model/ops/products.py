"""Products of bfloat16 matrices with sums in float32 by compiled kernels, for training on the CPU.

Inputs and results are bfloat16 rows, contiguous unless said otherwise. The kernels use the
processor's instructions for such products; without these, `available` is false and torch computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch

from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.ops import build


def available() -> bool:
    """Whether this process has kernels for bfloat16 products that the processor supports."""
    return _library() is not None


def fits(matrix: NF4Matrix) -> bool:
    """Whether `product` takes the matrix: its rows have whole blocks, and it is on the CPU."""
    return matrix.shape[1] % BLOCK == 0 and not matrix.packed.is_cuda


def product(
    matrix: NF4Matrix, maxima: torch.Tensor, x: torch.Tensor, *, back: bool = False
) -> torch.Tensor:
    """`x @ W.T` for x [T, in], or with `back` `x @ W` for x [T, out]; W rounded to bfloat16."""
    out, fan_in = matrix.shape
    x = x.contiguous()
    assert x.dtype == torch.bfloat16
    assert x.shape == (len(x), out if back else fan_in)
    y = x.new_empty(len(x), fan_in if back else out)
    codes = matrix.packed.data_ptr(), maxima.data_ptr()
    sizes = out, fan_in, c_void_p(x.data_ptr()), len(x), int(back)
    _call("product", *map(c_void_p, codes), *sizes, c_void_p(y.data_ptr()))
    return y


def head(weight: torch.Tensor, x: torch.Tensor, into: torch.Tensor) -> None:
    """Writes `x @ weight.T` [rows, vocab] to `into`."""
    _check(weight, x, into)
    assert into.shape == (len(x), len(weight))
    pointers = c_void_p(x.data_ptr()), len(x), c_void_p(into.data_ptr())
    _call("head", c_void_p(weight.data_ptr()), *weight.shape, *pointers)


def head_gradient(weight: torch.Tensor, gradient: torch.Tensor, into: torch.Tensor) -> None:
    """Adds `gradient @ weight` [rows, width] to `into`, float32; the gradient is [rows, vocab]."""
    _check(weight, gradient)
    assert into.dtype == torch.float32
    assert into.is_contiguous()
    assert into.shape == (len(gradient), weight.shape[1])
    pointers = c_void_p(gradient.data_ptr()), len(gradient), c_void_p(into.data_ptr())
    _call("head_gradient", c_void_p(weight.data_ptr()), *weight.shape, *pointers)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change `(x A) B` of the columns of a product from `column` on.

    a [r, in] and b [r, columns] are float32; b may have any strides.
    """

    a: torch.Tensor
    b: torch.Tensor
    column: int


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """Changes of the rows of a product from `row` on, which read the same x [rows, in].

    Attributes:
        reduced: the results of all A's side by side, [rows, sum of ranks].
    """

    row: int
    x: torch.Tensor
    reduced: torch.Tensor
    changes: Sequence[LowRank]


def add_low_rank(y: torch.Tensor, readings: Sequence[LowRankRows]) -> None:
    """Adds the changes to y [T, out] in place and writes each reading's `reduced`."""
    pointer, _keep = _changed(y, readings, None, None)
    _call("add_adapters", byref(pointer))


def low_rank_gradients(
    gradient: torch.Tensor,
    readings: Sequence[LowRankRows],
    to_x: Sequence[torch.Tensor | None],
    adds: Sequence[bool],
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The gradients of A and B, float32, of every change of every reading, for that of y.

    Also writes each reading's gradient of x, bfloat16 [rows, in], where there is a tensor for it,
    or adds it to what the tensor has, as `adds` says.
    """
    found = [
        [(torch.empty_like(c.a), c.b.new_empty(c.b.shape)) for c in reading.changes]
        for reading in readings
    ]
    pointer, _keep = _changed(gradient, readings, found, to_x, adds)
    _call("adapters_back", byref(pointer))
    return found


class _LowRank(Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("b_step", c_int64),
        ("rank", c_int),
        ("column", c_int),
        ("columns", c_int),
        ("to_a", c_void_p),
        ("to_b", c_void_p),
    )


class _Reading(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("reduced", c_void_p),
        ("to_x", c_void_p),
        ("changes", POINTER(_LowRank)),
        ("row", c_int),
        ("rows", c_int),
        ("count", c_int),
        ("ranks", c_int),
        ("adds", c_int),
    )


class _Changed(Structure):
    _fields_ = (
        ("y", c_void_p),
        ("width", c_int64),
        ("input", c_int),
        ("readings", POINTER(_Reading)),
        ("count", c_int),
    )


def _changed(
    y: torch.Tensor,
    readings: Sequence[LowRankRows],
    found: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]] | None,
    to_x: Sequence[torch.Tensor | None] | None,
    adds: Sequence[bool] = (),
) -> tuple[_Changed, list[object]]:
    """The kernels' form of the changes, and what must be kept while it is used."""
    _check(y)
    rows: list[_Reading] = []
    kept: list[object] = []
    for number, reading in enumerate(readings):
        _check(reading.x, reading.reduced)
        changes = []
        for i, c in enumerate(reading.changes):
            assert c.a.dtype == c.b.dtype == torch.float32
            assert c.a.is_contiguous()
            assert 0 <= c.column <= y.shape[1] - c.b.shape[1]
            into = [t.data_ptr() for t in found[number][i]] if found else [None, None]
            sizes = len(c.a), c.column, c.b.shape[1]
            pointers = c.a.data_ptr(), c.b.data_ptr()
            changes.append(_LowRank(*pointers, *c.b.stride(), *sizes, *into))
        array = (_LowRank * len(changes))(*changes)
        target = to_x[number] if to_x else None
        if target is not None:
            _check(target)
        assert reading.row + len(reading.x) <= len(y)
        rows.append(
            _Reading(
                reading.x.data_ptr(),
                reading.reduced.data_ptr(),
                None if target is None else target.data_ptr(),
                array,
                reading.row,
                len(reading.x),
                len(changes),
                reading.reduced.shape[1],
                int(bool(adds) and adds[number]),
            )
        )
        kept.append(array)
    every = (_Reading * len(rows))(*rows)
    kept.append(every)
    fan_in = readings[0].x.shape[1] if readings else 0
    return _Changed(y.data_ptr(), y.stride(0), fan_in, every, len(rows)), kept


class _Heads(Structure):
    _fields_ = (("at", c_void_p), ("stride", c_int64))


class _Attending(Structure):
    _fields_ = (
        ("q", _Heads),
        ("k", _Heads),
        ("v", _Heads),
        ("heads", c_int),
        ("kv_heads", c_int),
        ("width", c_int),
        ("window", c_int),
        ("scale", c_float),
    )


class _Derivative(Structure):
    _fields_ = tuple((name, _Heads) for name in ("out", "to_out", "to_q", "to_k", "to_v"))


@dataclass(frozen=True, slots=True)
class Attending:
    """Causal attention within sequences side by side.

    Attributes:
        starts: int32 [sequences + 1]; sequence s has the rows `starts[s]` to `starts[s + 1] - 1`.
        window: positions that a query sees, its own included; 0 for all.
    """

    starts: torch.Tensor
    window: int
    scale: float


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Attending
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [T, heads, d] over k and v [T, kv_heads, d], which may be columns of others.

    Returns [T, heads * d], and the logarithms of the softmax's sums, float32 [heads, T].
    """
    out, logs = q.new_empty(len(q), q.shape[1] * q.shape[2]), torch.empty(q.shape[1], len(q))
    sequences = c_void_p(how.starts.data_ptr()), len(how.starts) - 1
    pointers = c_void_p(out.data_ptr()), c_void_p(logs.data_ptr())
    _call("attend", byref(_attending(q, k, v, how)), *sequences, *pointers)
    return out, logs


def attend_back(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    how: Attending,
    found: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their shapes, for that of the first result of `attend`."""
    out, logs = found
    gradient = gradient.contiguous()
    into = [t.new_empty(t.shape) for t in (q, k, v)]
    rows = [_Heads(t.data_ptr(), t.stride(0)) for t in (out, gradient, *into)]
    sequences = c_void_p(how.starts.data_ptr()), len(how.starts) - 1
    of = byref(_attending(q, k, v, how)), byref(_Derivative(*rows))
    _call("attend_back", *of, *sequences, c_void_p(logs.data_ptr()))
    return into[0], into[1], into[2]


def _attending(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Attending) -> _Attending:
    assert how.starts.dtype == torch.int32
    assert int(how.starts[-1]) == len(q)
    for t in (q, k, v):
        assert t.dtype == torch.bfloat16
        assert t.stride()[1:] == (t.shape[2], 1)
    rows = [_Heads(t.data_ptr(), t.stride(0)) for t in (q, k, v)]
    return _Attending(*rows, q.shape[1], k.shape[1], q.shape[2], how.window, how.scale)


@cache
def _library() -> build.Kernels | None:
    try:
        library = build.load()
    except build.KernelsUnavailable:
        return None  # `unpack.kernel` logs the warning
    return library if library.loraplex_train_has_products() else None


def _call(name: str, *arguments: object) -> None:
    """Calls a kernel. Raises MemoryError."""
    call = getattr(_library(), f"loraplex_train_{name}")
    if call(*arguments, torch.get_num_threads()):
        raise MemoryError(f"no memory for the kernel `{name}` of a training pass")


def _check(*tensors: torch.Tensor) -> None:
    assert all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in tensors)
