"""Every build of the kernels that this machine can run."""

from __future__ import annotations

import ctypes

import pytest
from loraplex_model.ops import build

# On an AVX2 machine the 16-lane code is tested too: the compiler splits its vectors in two.
BUILDS = [(isa, ()) for isa in build.supported_isas()]
if "avx512" not in build.supported_isas() and "avx2" in build.supported_isas():
    BUILDS.append(("avx2", ("-DLANES=16",)))


@pytest.fixture(scope="session", params=BUILDS, ids=lambda b: "-".join([b[0], *b[1]]))
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """One build of the kernels."""
    isa, flags = request.param
    return build.load(isa, flags)
