"""What this machine's packages offer to the decoder on CUDA, found without importing them."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from loraplex_model.base import durable
from loraplex_model.base.config import DecoderConfig

_WIDEST_HEAD = 256
_DRIVER = Path("/proc/driver/nvidia/version")


def obstacle_to_triton() -> str | None:
    """Why the Triton kernels cannot be used; None if the package is there."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def obstacle_to_kernels(
    device: torch.device, dtype: torch.dtype, config: DecoderConfig
) -> str | None:
    """Why the Triton kernels cannot compute with a base model on CUDA; None if they can.

    Triton compiles what launches a kernel with the machine's C compiler.
    """
    if why := obstacle_to_triton():
        return why
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the compute type is {str(dtype).removeprefix('torch.')}"
    if config.head_dim > _WIDEST_HEAD:
        return f"heads have a width of {config.head_dim}, above {_WIDEST_HEAD}"
    if config.head_dim % 2:
        return f"heads have a width of {config.head_dim}, an odd number"
    if config.num_experts:
        return "the base model is a mixture of experts"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the device has compute capability {major}.{minor}, below 8.0"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "there is no C compiler (gcc, clang or cc)"
    return None


def obstacle_to_bitsandbytes(cuda: str | None) -> str | None:
    """Why bitsandbytes cannot compute on CUDA; None if it has a library for this version.

    `cuda` is torch's version of CUDA, such as "13.0". A library for another minor version of the
    same major one serves too; bitsandbytes picks it by itself.
    """
    if cuda is None:
        return "torch is built without CUDA"
    found = find_spec("bitsandbytes")
    if found is None or found.origin is None:
        return "the package bitsandbytes is not installed"
    names = sorted(each.stem for each in Path(found.origin).parent.glob("libbitsandbytes_cuda*"))
    versions = [name.removeprefix("libbitsandbytes_cuda") for name in names]
    if any(version[:2] == cuda.partition(".")[0] for version in versions):
        return None
    return f"bitsandbytes has no library for CUDA {cuda}, only for {', '.join(versions) or 'none'}"


def card_name(device: torch.device, dtype: torch.dtype) -> str:
    """Everything on which the time of a product depends, for `choices.Timings`."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    driver = ""
    with suppress(OSError, UnicodeDecodeError):
        driver = durable.read_regular(_DRIVER).decode().partition("\n")[0].strip()
    packages = [f"{name} {_version(name)}" for name in ("torch", "triton", "bitsandbytes")]
    kernels = hashlib.sha256(Path(__file__).with_name("kernels").joinpath("nf4.py").read_bytes())
    number = str(dtype).removeprefix("torch.")
    return "; ".join([card, driver, *packages, number, f"kernels {kernels.hexdigest()[:12]}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
