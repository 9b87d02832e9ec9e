"""Reads one row behind the end; tests/kernels/test_sanitized.py runs this where that is noticed."""

from __future__ import annotations

import ctypes

import torch


def test_a_row_too_many(library: ctypes.CDLL) -> None:
    x, angles = torch.randn(6, 8), torch.randn(6, 4)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, angles, angles)]
    library.loraplex_rotate(*pointers, 0, 7, 4)
