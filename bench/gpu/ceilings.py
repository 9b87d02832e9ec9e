"""S0: the limits of this device (bandwidth, arithmetic, latencies) and the installed versions."""

from __future__ import annotations

import sys
from importlib import metadata

import torch
from loraplex_model.ops import known_faults

from gpu.stage import StageReport
from gpu.timing import replay_seconds, seconds

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "numpy", "msgspec")

EXPECTED = {"H100": (2.8, 750.0), "H200": (4.0, 750.0)}
"""By card: TB/s of a copy and TFLOP/s of a product to expect; estimates from its data sheet."""

NODES = 540
"""Approximate number of kernels in a step of a model with 32 layers."""


def run(report: StageReport) -> None:
    """Measures the device; compares nothing, so only an exception is a failure."""
    device, dry = report.device, report.dry
    card = torch.cuda.get_device_name() if device == "cuda" else "no card"
    report.figure("card", card)
    report.figure("versions", versions())
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        report.figure("capability", f"sm_{about.major}{about.minor}")
        report.figure("memory_gb", about.total_memory / 1e9)
        report.figure("processors", about.multi_processor_count)
    figures = {
        "copy_tb_s": copied(device, 1 << 12 if dry else 2 << 30),
        "product_tflop_s": multiplied(device, 64 if dry else 8192),
        **to_device(device, 1 << 12 if dry else 84_000_000),
        "read_8_bytes_us": read_back(device),
        "graph_node_us": node(device, 4 if dry else NODES),
    }
    for name, value in figures.items():
        report.figure(name, value)
    report.table(["ceiling", "measured"], [[name, value] for name, value in figures.items()])
    report.note(f"{card}; " + ", ".join(f"{n} {v}" for n, v in versions().items()))
    for fault in known_faults.PACKAGE_FAULTS:
        if known_faults.has(fault, "cuda"):
            answer = f"avoided ({fault.avoided})" if fault.avoided else "the server refuses it"
            report.note(f"known fault of this {fault.package}: {fault.text}: {answer}")
    for name, (copy, product) in EXPECTED.items():
        low = figures["copy_tb_s"] < copy or figures["product_tflop_s"] < product
        if name in card and low:
            report.note(f"this {name} is slower than expected ({copy} TB/s, {product} TFLOP/s)")


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the packages; those that are not installed are left out."""
    found = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def copied(device: str, nbytes: int) -> float:
    """TB/s of a copy on the device, what is read and what is written both counted."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds(lambda: target.copy_(source), device) / 1e12


def multiplied(device: str, size: int) -> float:
    """TFLOP/s of a product of square bfloat16 matrices."""
    a = torch.randn(size, size, device=device).bfloat16()
    out = torch.empty_like(a)
    return 2 * size**3 / seconds(lambda: torch.mm(a, a, out=out), device) / 1e12


def to_device(device: str, nbytes: int) -> dict[str, float]:
    """GB/s of copies from the host, from pinned and from pageable memory."""
    found = {}
    for name, pin in (("pinned_gb_s", True), ("pageable_gb_s", False)):
        source = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin and device == "cuda")
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        duration = seconds(lambda s=source, t=target: t.copy_(s, non_blocking=True), device)
        found[name] = nbytes / duration / 1e9
    return found


def read_back(device: str) -> float:
    """Microseconds until the host has eight bytes of the device."""
    value = torch.zeros(1, dtype=torch.int64, device=device)
    return seconds(lambda: value.cpu(), device) * 1e6


def node(device: str, nodes: int) -> float:
    """Microseconds of a kernel that does next to nothing, in a graph of many."""
    value = torch.zeros(1, device=device)
    return replay_seconds([lambda: value.add_(1)] * nodes, device) / nodes * 1e6
