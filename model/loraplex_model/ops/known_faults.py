"""Faults of the packages that compute: which versions have them, and what is done about them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

import torch

from loraplex_model.base.refusal import Problem, Reason, Refusal


@dataclass(frozen=True, slots=True)
class PackageFault:
    """A fault of some versions of a package.

    Attributes:
        package: name of the distribution.
        first: the first version with the fault; "" for the oldest.
        fixed: the first version without it; "" if there is none yet.
        device: the device type on which it matters; "" for every one.
        text: what goes wrong, and where it is reported.
        avoided: what is done so that it does not matter; "" if the version is refused instead.
    """

    package: str
    first: str
    fixed: str
    device: str
    text: str
    avoided: str = ""


PACKAGE_FAULTS = (
    PackageFault(
        "torch",
        first="",
        fixed="2.5",
        device="",
        text="its fused attention cannot share a key head among query heads (enable_gqa)",
    ),
    PackageFault(
        "torch",
        first="",
        fixed="2.12",
        device="cuda",
        text="varlen_attn has no block table, so it cannot read a paged cache",
        avoided="decoder/flash.py: attention of one sequence after the other, with a warning",
    ),
    PackageFault(
        "torch",
        first="2.12",
        fixed="",
        device="cuda",
        text="varlen_attn with a block table leaves the rows of all sequences but the first "
        "unwritten if it splits the keys (pytorch#194167, torchtitan#3235)",
        avoided="decoder/flash.py: num_splits=1",
    ),
    PackageFault(
        "torch",
        first="2.5",
        fixed="",
        device="cuda",
        text="cuDNN's attention gives NaN gradients for masks on Hopper (pytorch#196678) and wrong "
        "results for few key heads on Blackwell (pytorch#193893)",
        avoided="`avoid`: scaled_dot_product_attention does not use cuDNN",
    ),
)
"""The known faults that concern operations which are used here."""


def check(device: str) -> None:
    """Refuses packages that would compute wrong results, or fail, on a device type.

    Raises `Refusal` (PACKAGE_UNSUPPORTED) that lists all of them.
    """
    problems = [
        Problem(
            fault.package,
            f"{fault.package} {version} cannot be used: {fault.text}; install "
            + (f"{fault.package}>={fault.fixed}" if fault.fixed else f"one before {fault.first}"),
        )
        for fault in PACKAGE_FAULTS
        if not fault.avoided and (version := version_of(fault.package)) and has(fault, device)
    ]
    if device == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        text = "bitsandbytes is not installed, and NF4 products on CUDA need it; install it, or "
        problems.append(Problem("bitsandbytes", text + "use --device cpu"))
    if problems:
        raise Refusal.listing(Reason.PACKAGE_UNSUPPORTED, problems)


def avoid(device: str) -> None:
    """Switches off, in this process, what is known to be wrong on a device type."""
    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def has(fault: PackageFault, device: str) -> bool:
    """Whether the installed version of the package has the fault on a device type."""
    version = version_of(fault.package)
    if not version or fault.device not in ("", device):
        return False
    number = release(version)
    return release(fault.first) <= number and (not fault.fixed or number < release(fault.fixed))


def version_of(package: str) -> str:
    """The installed version of a package; "" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what marks a build or a pre-release: 2.13.0a0+cu130."""
    numbers: list[int] = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    while numbers and not numbers[-1]:  # 2.5 is 2.5.0
        numbers.pop()
    return tuple(numbers)
