"""The file of a signature: what it says, and whether a key has signed that.

The form is that of the OpenSSF's model-signing 1.0: a Sigstore bundle, version 0.3, with a DSSE
envelope. Only what is signed is used; certificates and logs in the bundle are ignored.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format import strict_json
from loraplex_adapters.signing.keys import is_signed_by

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

MAX_BUNDLE_BYTES: Final = 256 << 10
"""Most bytes of a signature's file. One with two files has 2 KB."""

BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"

_MOST_SIGNATURES: Final = 8


@dataclass(frozen=True, slots=True)
class Statement:
    """What a signature says: the SHA-256 in hex of each file, and the adapter's name."""

    name: str
    files: Mapping[str, str]

    def encode(self) -> bytes:
        """The statement as it is signed, in model-signing's form."""
        resources = [
            {"algorithm": "sha256", "digest": digest, "name": name}
            for name, digest in sorted(self.files.items())
        ]
        serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": self.name, "digest": {"sha256": _root(resources)}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "serialization": {**serialization, "ignore_paths": []},
                "resources": resources,
            },
        }
        return json.dumps(statement).encode()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A signature's file. Nothing in it is trusted before `statement` has checked it."""

    payload: bytes
    signatures: tuple[bytes, ...]

    def is_signed_by(self, key: ec.EllipticCurvePublicKey) -> bool:
        """Whether one of the signatures was made with this key."""
        message = signed_bytes(self.payload)
        return any(is_signed_by(key, signature, message) for signature in self.signatures)

    def statement(self) -> Statement:
        """What the signature says. Raises Refusal(SIGNATURE_INVALID) if that is malformed."""
        try:
            said = _dict(strict_json.loads(self.payload))
            if said["_type"] != STATEMENT_TYPE or said["predicateType"] != PREDICATE_TYPE:
                raise ValueError("it is not a statement of model-signing 1.0")
            (subject,) = said["subject"]
            predicate = _dict(said["predicate"])
            form = _dict(predicate["serialization"])
            if form.get("method") != "files" or form.get("hash_type") != "sha256":
                raise ValueError("it does not list the SHA-256 of whole files")
            resources = [_dict(each) for each in predicate["resources"]]
            files = {str(each["name"]): str(each["digest"]) for each in resources}
            if len(files) != len(resources):
                raise ValueError("it lists a file twice")
            if any(each["algorithm"] != "sha256" for each in resources):
                raise ValueError("it does not list the SHA-256 of whole files")
            if _dict(subject["digest"]).get("sha256") != _root(resources):
                raise ValueError("the digest of its list of files is wrong")
            return Statement(str(subject["name"]), files)
        except (ValueError, KeyError, TypeError) as error:
            said_of = f": {error}" if type(error) is ValueError else ""
            raise malformed(f"what is signed cannot be read{said_of}") from None


def parse(data: bytes) -> Bundle:
    """Reads a signature's file. Raises Refusal(SIGNATURE_INVALID)."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise malformed(f"it has more than {MAX_BUNDLE_BYTES} bytes")
    try:
        found = _dict(strict_json.loads(data))
        envelope = _dict(found["dsseEnvelope"])
        if found["mediaType"] != BUNDLE_TYPE or envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [
            base64.b64decode(each["sig"], validate=True) for each in envelope["signatures"]
        ]
        if not 1 <= len(signatures) <= _MOST_SIGNATURES:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        message = "it is not a bundle of model-signing with a key (version 1.0 or newer)"
        raise malformed(message) from None
    return Bundle(payload, tuple(signatures))


def write(payload: bytes, signature: bytes, key_hint: str) -> bytes:
    """The file of a signature; `key_hint` is the SHA-256 in hex of the public key's PEM."""
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key_hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle).encode() + b"\n"


def signed_bytes(payload: bytes) -> bytes:
    """The bytes that are signed for a payload: DSSE's pre-authentication encoding, version 1."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def malformed(why: str) -> Refusal:
    """The refusal of a signature that cannot be read."""
    return Refusal(Reason.SIGNATURE_INVALID, f"the signature cannot be used: {why}", "signature")


def _root(resources: list[dict[str, Any]]) -> str:
    """SHA-256 of the files' digests, one after the other. Raises ValueError for a wrong one."""
    digests = [bytes.fromhex(each["digest"]) for each in resources]
    if any(len(digest) != 32 for digest in digests):
        raise ValueError("it does not list the SHA-256 of whole files")
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value
