"""The operator's policy: which keys may sign for which names.

bind_names = true          # the name in a signature must be the one that is registered
unsigned = ["dev-"]        # names with these beginnings need no signature
training = "signed"        # "unsigned": adapters that the server trains need none

[keys.release]
public_key = "release.pem" # a file, relative to this one, or the PEM itself
names = ["prod-", "ops-"]  # beginnings of the names that it may sign for; "" for all
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.signing import bundle, keys
from loraplex_adapters.signing.files import TEMPLATE_FILE, file_digests

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_TRAINING: Final = ("signed", "unsigned")


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that may sign, and the beginnings of the names that it may sign for."""

    name: str
    public: ec.EllipticCurvePublicKey
    names: tuple[str, ...]

    def may_sign_for(self, name: str) -> bool:
        """Whether the key may sign for adapters of this name."""
        return name.startswith(self.names)


@dataclass(frozen=True, slots=True)
class Policy:
    """Which keys may sign for which names.

    Attributes:
        unsigned: beginnings of names that need no signature.
        bind_names: whether the name in a signature must be the one that is registered.
        trains_unsigned: whether adapters that the server trains need no signature.
    """

    keys: tuple[SigningKey, ...]
    unsigned: tuple[str, ...] = ()
    bind_names: bool = True
    trains_unsigned: bool = False

    def requires(self, name: str) -> bool:
        """Whether an adapter of this name needs a signature."""
        return not name.startswith(self.unsigned) if self.unsigned else True

    def check(self, folder: Path, name: str, signature: bytes, template: str = "") -> str:
        """Checks the signature of an adapter's files, and of its chat template, "" without one.

        Returns the name of the key; "" if the name needs no signature.
        Raises Refusal(SIGNATURE_INVALID, field "signature").
        """
        if not self.requires(name):
            return ""
        if not signature:
            raise _refused(f"{name} needs a signature of one of the operator's keys")
        found = bundle.parse(signature)
        allowed = [key for key in self.keys if key.may_sign_for(name)]
        signer = next((key for key in allowed if found.is_signed_by(key.public)), None)
        if signer is None:
            raise _refused(f"the signature was made by no key that may sign for {name}")
        said = found.statement()
        if self.bind_names and said.name != name:
            text = f"the signature is for an adapter of another name than {name}"
            raise _refused(f"{text}; sign the adapter as {name}")
        actual = file_digests(folder)
        if template:
            actual[TEMPLATE_FILE] = hashlib.sha256(template.encode()).hexdigest()
        for file, digest in actual.items():
            if said.files.get(file) != digest:
                raise _refused(f"the signature is for another {file}")
        return signer.name

    def require_trained(self, name: str) -> None:
        """Raises Refusal(SIGNATURE_INVALID) if an adapter of this name may not be trained here.

        The server has no key to sign with.
        """
        if self.requires(name) and not self.trains_unsigned:
            raise _refused(
                f"{name} needs a signature, which the server cannot make for an adapter that it "
                "trains; train it outside of the server and sign it, or use another name"
            )

    def require_alias(self, alias: str, name: str) -> None:
        """Raises Refusal(SIGNATURE_INVALID) if an alias needs more than the adapter's name does.

        An alias is used like a name. So every key that may sign for the name must be one that may
        sign for the alias, and an unsigned name has no alias that needs a signature.
        """
        if not self.requires(alias):
            return
        if self.requires(name) and all(
            key.may_sign_for(alias) for key in self.keys if key.may_sign_for(name)
        ):
            return
        raise _refused(f"{alias} needs a signature that {name} does not need")


def read_policy(file: Path) -> Policy:
    """Reads a policy and its keys. Raises Refusal(CONFIG_INVALID), which names the file."""
    try:
        found = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(file, f"cannot be read: {error}") from None
    unknown = found.keys() - {"bind_names", "unsigned", "training", "keys"}
    if unknown:
        raise _wrong(file, f"there is no setting {min(unknown)}")
    tables, training = found.get("keys", {}), found.get("training", _TRAINING[0])
    bind_names = found.get("bind_names", True)
    if not isinstance(tables, dict) or not tables:
        raise _wrong(file, "it names no key ([keys.NAME])")
    if training not in _TRAINING:
        raise _wrong(file, 'training must be "signed" or "unsigned"')
    if not isinstance(bind_names, bool):
        raise _wrong(file, "bind_names must be true or false")
    made = tuple(_key(file, name, table) for name, table in sorted(tables.items()))
    unsigned = _prefixes(file, "unsigned", found.get("unsigned", []))
    return Policy(made, unsigned, bind_names, training == _TRAINING[1])


def _key(file: Path, name: str, table: Any) -> SigningKey:
    if not isinstance(table, Mapping) or table.keys() != {"public_key", "names"}:
        raise _wrong(file, f"keys.{name} must have public_key and names, and nothing else")
    text = table["public_key"]
    if not isinstance(text, str):
        raise _wrong(file, f"keys.{name}.public_key must be the name of a file, or PEM")
    try:
        pem = (
            text.encode()
            if text.lstrip().startswith("-----")
            else (file.parent / text).read_bytes()
        )
    except (OSError, ValueError) as error:
        raise _wrong(file, f"the key of keys.{name} cannot be read: {error}") from None
    names = _prefixes(file, f"keys.{name}.names", table["names"])
    if not names:
        raise _wrong(file, f"keys.{name}.names must list beginnings of names")
    return SigningKey(name, keys.public_key(pem, f"{file}: the key of keys.{name}"), names)


def _prefixes(file: Path, what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(file, f"{what} must be a list of texts")
    return tuple(value)


def _refused(message: str) -> Refusal:
    return Refusal(Reason.SIGNATURE_INVALID, message, "signature")


def _wrong(file: Path, message: str) -> Refusal:
    return Refusal(Reason.CONFIG_INVALID, f"{file}: {message}")
