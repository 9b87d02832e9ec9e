"""How the next token of a row is chosen, in the form that the kernels read."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int32, c_uint64, c_void_p


class DrawState(Structure):
    """The struct `Draw` of `decoder/cpu/sampling/row.h`, field by field.

    Whoever fills it keeps the arrays alive that it points to: ids are int64, values float32, `mask`
    uint32 (null: all tokens).
    """

    _fields_ = (
        ("seed", c_uint64),
        ("index", c_uint64),
        ("top_p", c_double),
        ("bias_ids", c_void_p),
        ("bias_values", c_void_p),
        ("seen_ids", c_void_p),
        ("counted_ids", c_void_p),
        ("counts", c_void_p),
        ("mask", c_void_p),
        ("biased", c_int32),
        ("seen", c_int32),
        ("counted", c_int32),
        ("top_k", c_int32),
        ("divisor", c_float),
        ("min_p", c_float),
        ("log_min_p", c_float),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("greedy", c_int32),
        ("plain", c_int32),
    )
