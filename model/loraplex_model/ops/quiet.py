"""Hides one warning of bitsandbytes: that the package `kernels` is missing.

On a CPU with AVX-512 BF16, bitsandbytes looks at import for a faster 4-bit product in that
optional package. No code here calls the product on a CPU.
"""

from __future__ import annotations

import logging


def quieten_bitsandbytes() -> None:
    """Hides the warning. To be called before whatever imports bitsandbytes first."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
