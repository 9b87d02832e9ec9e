"""TLS of the gRPC ports, whose certificate is replaced without a restart.

The files are read again when a connection begins, at most once a second. What has changed is
checked, and only then used, for this connection and later ones; running connections keep theirs.
Files that are wrong, or half written, change nothing: the next connection looks at them again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import grpc
from loraplex_model.base.refusal import Refusal

from loraplex_server.access.identity.server_certificate import (
    CertificateFiles,
    ServerCertificate,
    date,
)
from loraplex_server.series import Series
from loraplex_server.settings import ServerSettings

LOOK_SECONDS: Final = 1.0
"""Shortest time between two looks at the files."""

log = logging.getLogger(__name__)


class ServerTls:
    """The certificate in use, and the files that a newer one comes from. Safe to use from threads.

    gRPC for Python can ask clients for a certificate only if it then requires one of each of them.
    """

    def __init__(
        self,
        files: CertificateFiles,
        series: Series,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the files. Raises Refusal(CONFIG_INVALID) with the file and its fault."""
        self._files = files
        self._series = series
        self._clock = clock
        self._lock = threading.Lock()
        self._looked = clock()
        self._complaint = ""
        self._current = files.check(files.read(), time.time())
        self._announce(self._current)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port; every port needs its own."""
        used = self._current

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            current = self.look()
            if current is used:
                return None
            used = current
            return _configuration(current)

        fetch: Any = newer  # the stubs do not know that it may return None
        return grpc.dynamic_ssl_server_credentials(
            _configuration(used), fetch, self._files.client_ca is not None
        )

    def look(self) -> ServerCertificate:
        """The certificate to use now. Reads the files if that was not done within a second."""
        with self._lock:
            if self._clock() - self._looked >= LOOK_SECONDS:
                self._looked = self._clock()
                self._reload()
            return self._current

    def _reload(self) -> None:
        try:
            pem = self._files.read()
            if pem == self._current.pem:
                self._complaint = ""
                return
            fresh = self._files.check(pem, time.time())
        except Refusal as refusal:
            self._series.tls_reloads.labels("error").inc()
            if refusal.message != self._complaint:
                self._complaint = refusal.message
                log.error("the certificate before stays in use: %s", refusal.message)
            return
        self._complaint = ""
        self._current = fresh
        self._series.tls_reloads.labels("ok").inc()
        log.info("a new certificate is in use; it expires on %s", date(fresh.expires))
        self._announce(fresh)

    def _announce(self, certificate: ServerCertificate) -> None:
        self._series.tls_certificate_expiry_timestamp_seconds.set(certificate.expires)
        for text in self._files.warnings(certificate, time.time()):
            log.warning("%s", text)


def server_tls(settings: ServerSettings, series: Series) -> ServerTls | None:
    """TLS as the settings say; None if connections are not encrypted. Raises as `ServerTls`."""
    files = CertificateFiles.of(settings)
    return None if files is None else ServerTls(files, series)


def _configuration(certificate: ServerCertificate) -> grpc.ServerCertificateConfiguration:
    pem = certificate.pem
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], pem.client_ca)
