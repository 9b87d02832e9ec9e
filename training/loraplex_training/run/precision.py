"""The types in which a run computes: chosen when it starts, and kept when it is resumed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from loraplex_model.base.refusal import Problem, Reason
from loraplex_model.ops import build, products

from loraplex_training.spec.fields import refusal
from loraplex_training.spec.spec import RunSpec


def chosen(spec: RunSpec, device: torch.device) -> RunSpec:
    """Returns the options with the types that `auto` stands for on this machine.

    On a CPU whose kernels multiply bfloat16 by instructions made for it, these are bfloat16 for the
    products and the dense tensors; elsewhere they are float32. Raises Refusal(CONFIG_INVALID) for
    types that exclude each other.
    """
    if spec.products == "bfloat16" and (device.type != "cpu" or spec.dtype == "float64"):
        why = (
            f"dtype is {spec.dtype}"
            if device.type == "cpu"
            else f"this run is on the {device.type}"
        )
        text = f"products can be bfloat16 on a CPU with dtype float32 or bfloat16, and {why}"
        raise refusal(
            Reason.CONFIG_INVALID, [Problem("products", f"{text}; leave products at auto")]
        )
    fast = device.type == "cpu" and _has_kernels(spec)
    dtype = spec.dtype
    if dtype == "auto":
        narrow = spec.products == "bfloat16" or (spec.products == "auto" and fast)
        dtype = "bfloat16" if narrow else "float32"
    if spec.products != "auto":
        return replace(spec, dtype=dtype)
    narrow = fast and dtype == "bfloat16"
    return replace(spec, dtype=dtype, products="bfloat16" if narrow else "float32")


def products_of(spec: RunSpec) -> torch.dtype | None:
    """Returns the type of products for `JointPass`; None is that of all other states."""
    return torch.bfloat16 if spec.products == "bfloat16" else None


def _has_kernels(spec: RunSpec) -> bool:
    with suppress(build.KernelsUnavailable):  # raised again where they are needed
        build.load(directory=spec.cache / "kernels")  # shared with a server
    return products.available()
