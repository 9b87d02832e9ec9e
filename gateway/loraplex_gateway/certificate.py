"""The certificate with which HTTP is encrypted, replaced without a restart.

The files are looked at when a connection begins, at most once a second. If they have changed, they
are read and, if they can be used, taken for this connection and later ones. Files that are wrong,
or half written, change nothing: a later connection looks at them again.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from loraplex_gateway.settings import SettingsError

LOOK_SECONDS: Final = 1.0
"""Shortest time between two looks at the files."""

_Marks = tuple[tuple[int, ...], ...]

log = logging.getLogger(__name__)


class HttpCertificate:
    """The certificate in use, and the files that a newer one comes from.

    Attributes:
        context: what to listen with. It chooses the certificate of each connection.
    """

    def __init__(self, chain: Path, key: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the files. Raises SettingsError with what is wrong with them."""
        self._files = (("certificate", chain), ("private_key", key))
        self._clock = clock
        self._looked = clock()
        self._complaint = ""
        # Taken before the content is: a change in between shows as one at the next look.
        self._marks = self._look_at_files()
        self.context = self._current = self._read()
        self.context.sni_callback = self._choose

    def _choose(
        self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _: ssl.SSLContext
    ) -> None:
        """Gives a connection that begins the certificate to use now, with or without a name."""
        if self._clock() - self._looked >= LOOK_SECONDS:
            self._looked = self._clock()
            self._reload()
        if self._current is not self.context:
            connection.context = self._current

    def _reload(self) -> None:
        """Takes the files into use if they have changed, or were wrong, and are right now."""
        try:
            marks = self._look_at_files()
            if marks == self._marks and not self._complaint:
                return
            # A context of its own, because one keeps certificates of other kinds of keys.
            self._current = self._read()
        except SettingsError as error:
            text = str(error)
            if text != self._complaint:
                log.error("the certificate before stays in use: %s", text)
            self._complaint = text
            return
        self._marks, self._complaint = marks, ""
        log.info("a new certificate is in use")

    def _look_at_files(self) -> _Marks:
        """What changes with every change of the files. Raises SettingsError."""
        found = []
        for name, path in self._files:
            try:
                status = os.stat(path)
            except OSError as error:
                text = f"{name}: {path} cannot be read: {error.strerror or error}"
                raise SettingsError(text) from None
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"{name}: {path} is not a file")
            times = status.st_mtime_ns, status.st_ctime_ns
            found.append((status.st_dev, status.st_ino, status.st_size, *times))
        return tuple(found)

    def _read(self) -> ssl.SSLContext:
        """A context with the files' content. Raises SettingsError."""
        (_, chain), (_, key) = self._files
        for name, path in self._files:
            if not os.access(path, os.R_OK):
                raise SettingsError(f"{name}: {path} cannot be read: no permission")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # The password of an encrypted key would be asked for at the terminal otherwise.
            context.load_cert_chain(chain, key, password="")
        except ssl.SSLError as error:
            why = (error.reason or "they hold no PEM").lower().replace("_", " ")
            text = f"certificate, private_key: {chain} and {key} cannot be used: {why}"
            raise SettingsError(text) from None
        except (OSError, ValueError) as error:
            raise SettingsError(f"certificate, private_key: cannot be used: {error}") from None
        return context
