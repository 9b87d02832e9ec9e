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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every build in turn; with --sanitized the sanitized one alone."""
    if "library" in metafunc.fixturenames:
        is_sanitized = metafunc.config.getoption("--sanitized")
        builds = [(sanitized.isa(), sanitized.FLAGS)] if is_sanitized else BUILDS
        names = ["-".join([isa, *flags]) for isa, flags in builds]
        metafunc.parametrize("library", builds, ids=names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """One build of the kernels."""
    isa, flags = request.param
    return build.load(isa, flags)
