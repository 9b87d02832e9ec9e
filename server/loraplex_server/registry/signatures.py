"""Checks the signatures of adapters that are registered, by the operator's policy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from loraplex_adapters.signing import Policy, read_policy
from loraplex_adapters.store import Approval
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.registry.terms import RegistrationTerms

log = logging.getLogger(__name__)

_UNREADABLE: Final = "the server's policy of signatures cannot be read, so nothing is registered"


class Signatures:
    """The policy in a file, which is read again for every check; None requires no signatures.

    Methods block. They raise Refusal(SIGNATURE_INVALID), also if the policy cannot be read any
    more: a damaged policy allows nothing.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file

    @classmethod
    def open(cls, file: Path | None) -> Signatures:
        """Reads the policy once, to check it. Raises Refusal(CONFIG_INVALID)."""
        if file is not None:
            read_policy(file)
        return cls(file)

    def approval(self, terms: RegistrationTerms) -> Approval | None:
        """The check of the files that are registered on these terms; None if none is needed."""
        policy = self._policy()
        if policy is None or (terms.trained and policy.trains_unsigned):
            return None

        def approve(copy: Path) -> tuple[str, ...]:
            template = terms.text.chat_template
            signer = policy.check(copy, terms.name, terms.signature, template)
            if not signer:
                return ()
            log.info("the files of %s are signed by the key %s", terms.name, signer)
            return (f"signed by the key {signer}",)

        return approve

    def require_trained(self, name: str) -> None:
        """Refuses a name for which an adapter that is trained here could not be registered."""
        policy = self._policy()
        if policy is not None:
            policy.require_trained(name)

    def require_alias(self, alias: str, name: Callable[[], str]) -> None:
        """Refuses an alias that needs a signature unless the adapter `name()` needs it too."""
        policy = self._policy()
        if policy is not None:
            policy.require_alias(alias, name())

    def _policy(self) -> Policy | None:
        if self._file is None:
            return None
        try:
            return read_policy(self._file)
        except Refusal as refusal:
            log.error("%s", refusal.message)
            raise Refusal(Reason.SIGNATURE_INVALID, _UNREADABLE, "signature") from refusal
