"""Which tests run where: `slow` ones on request, `gpu` ones where there is a CUDA device."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--field", action="store_true", help="run the tests in tests/field too")
    parser.addoption(
        "--real", action="store_true", help="run the tests of a published checkpoint too"
    )
    parser.addoption("--fault", metavar="NAME", help="run only the tests of this fault")
    parser.addoption(
        "--without-fsync",
        action="store_true",
        help="replace fsync by nothing, which tests of power cuts must notice",
    )
    parser.addoption(
        "--sanitized",
        action="store_true",
        help="use kernels compiled with sanitizers; run by scripts/sanitized.py",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which kernels ran, since that depends on the machine."""
    from loraplex_model.ops import build

    isas = build.supported_isas()
    tested = [isa for isa in ("amx", "avx512bf16") if isa in isas]
    products = f"by {' and '.join(tested)}, and by" if tested else "by"
    terminalreporter.write_line(
        f"kernels: {isas[0]} by default, of {', '.join(isas)}; products of bfloat16 {products} "
        "the software versions of both orders"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A script's background job ignores SIGINT, and so would the trainers that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--without-fsync"):
        os.fsync = lambda descriptor: None
    if config.getoption("--sanitized"):
        from kernels import sanitized

        sanitized.use()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[object]:
    """Runs each test as if it were the first: with the same seed of torch, log and umask.

    Commands that run within a test set up the process's log and change its umask.
    """
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)  # torch's own is another one in each process
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        return (yield)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        os.umask(umask)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # Shown in JUnit reports, from which `make test-seams` counts.
        item.user_properties += [("fault", name) for name in faults(item)]
    wanted = config.getoption("--fault")
    if wanted:
        config.hook.pytest_deselected(items=[i for i in items if wanted not in faults(i)])
        items[:] = [item for item in items if wanted in faults(item)]
    if not config.getoption("--slow"):
        _skip(items, "slow", "slow: runs with --slow")
    if not config.getoption("--real"):
        _skip(items, "real", "real: runs with --real")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch  # seconds, so only where a test asks for it

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")


def faults(item: pytest.Item) -> list[str]:
    """Names of the faults that a test is for."""
    return [name for marker in item.iter_markers("fault") for name in marker.args]


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
