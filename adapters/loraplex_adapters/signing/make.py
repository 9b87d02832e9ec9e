"""Signs an adapter with a private key."""

from __future__ import annotations

import hashlib
from pathlib import Path

from loraplex_adapters.signing import bundle, keys
from loraplex_adapters.signing.files import TEMPLATE_FILE, file_digests


def sign(folder: Path, name: str, key_pem: bytes, password: bytes | None = None) -> bytes:
    """Signs an adapter's files, to be registered as `name`; returns the signature's file.

    A file chat_template.jinja beside them is signed too.

    Raises Refusal: CONFIG_INVALID for a key that is none, and as opening an adapter does.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = keys.private_key(key_pem, password, "the key")
    digests = file_digests(folder)
    template = folder / TEMPLATE_FILE
    if template.is_file():
        digests[TEMPLATE_FILE] = hashlib.sha256(template.read_bytes()).hexdigest()
    payload = bundle.Statement(name, digests).encode()
    public = key.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(bundle.signed_bytes(payload), keys.algorithm(public))
    return bundle.write(payload, signature, hashlib.sha256(pem).hexdigest())
