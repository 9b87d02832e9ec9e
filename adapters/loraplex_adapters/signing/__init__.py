"""Signatures of adapters: who vouches for the files that are registered under a name.

A signature is a file of the OpenSSF's `model-signing` with an elliptic key: a Sigstore bundle with
a DSSE envelope around an in-toto statement, which lists the SHA-256 of every file of the adapter's
directory and names the adapter. Nothing is asked over a network.
"""

from loraplex_adapters.signing.bundle import MAX_BUNDLE_BYTES
from loraplex_adapters.signing.make import sign
from loraplex_adapters.signing.policy import Policy, read_policy

__all__ = ["MAX_BUNDLE_BYTES", "Policy", "read_policy", "sign"]
