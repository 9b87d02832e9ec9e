"""bitsandbytes' warning about an optional CPU kernel is hidden; its other messages are not."""

from __future__ import annotations

import logging

import pytest
from loraplex_model.ops.quiet import quieten_bitsandbytes


def test_only_the_warning_about_the_optional_kernel_is_hidden(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quieten_bitsandbytes()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    log.warning("the native library is missing")
    assert [record.message for record in caplog.records] == ["the native library is missing"]
