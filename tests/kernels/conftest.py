"""Every build of the kernels that this machine can run."""

from __future__ import annotations

import ctypes

import pytest
from kernels import sanitized
from loraplex_model.ops import build

# On an AVX2 machine the 16-lane code is tested too: the compiler splits its vectors in two.
BUILDS = [(isa, ()) for isa in build.supported_isas()]
if "avx512" not in build.supported_isas() and "avx2" in build.supported_isas():
    BUILDS.append(("avx2", ("-DLANES=16",)))

# Products of bfloat16, by the processor's instructions and, for orders of sums that none of them
# has, by the software version. Where there is an instruction, a test compares both.
BF16_ISAS = [isa for isa in ("amx", "avx512bf16") if isa in build.supported_isas()]
FLOATS = ("avx512", "avx2", "portable")
SOFTWARE_ISA = next(isa for isa in FLOATS if isa in build.supported_isas())
SOFTWARE = [(SOFTWARE_ISA, ("-O2", "-DLANES=16", f"-DLORAPLEX_BF16={order}")) for order in (1, 2)]
BF16_BUILDS = [
    (isa, ()) if isa in BF16_ISAS else software
    for isa, software in zip(("avx512bf16", "amx"), SOFTWARE, strict=True)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every build in turn; with --sanitized the sanitized one alone."""
    if "library" in metafunc.fixturenames:
        is_sanitized = metafunc.config.getoption("--sanitized")
        builds = [(sanitized.isa(), sanitized.FLAGS)] if is_sanitized else BUILDS
        metafunc.parametrize("library", builds, ids=_names(builds), indirect=True, scope="session")
    if "bf16_library" in metafunc.fixturenames:
        # AddressSanitizer does not see what AMX reads and writes, so it tests a software version.
        is_sanitized = metafunc.config.getoption("--sanitized")
        software = (SOFTWARE_ISA, (*SOFTWARE[0][1], *sanitized.FLAGS))
        builds = [software] if is_sanitized else BF16_BUILDS
        metafunc.parametrize(
            "bf16_library", builds, ids=_names(builds), indirect=True, scope="session"
        )


def _names(builds: list[tuple[str, tuple[str, ...]]]) -> list[str]:
    return ["-".join([isa, *flags]) for isa, flags in builds]


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """One build of the kernels."""
    isa, flags = request.param
    return build.load(isa, flags)


@pytest.fixture(scope="session")
def bf16_library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """One build of the kernels with products of bfloat16."""
    isa, flags = request.param
    return build.load(isa, flags)
