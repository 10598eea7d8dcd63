"""A server's certificates; renewed files are noticed at the next handshake."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import grpc

from ochredb.errors import InvalidArgument
from ochredb.rpc.channel import read_pem
from ochredb.rpc.config import RpcConfig

log = logging.getLogger("ochredb.rpc")

_Stamp = tuple[tuple[int, int], ...]


def server_credentials(config: RpcConfig) -> grpc.ServerCredentials:
    """With an authority: clients must show a certificate of it. Raises InvalidArgument."""
    files = _Files(config)
    try:
        first = files.load()
    except OSError as error:
        raise InvalidArgument(f"a TLS file cannot be read: {error}") from error
    return grpc.dynamic_ssl_server_credentials(
        first, files.renewed, require_client_authentication=config.tls_ca_path is not None
    )


class _Files:
    """The PEM files, and what they were when they were last read."""

    def __init__(self, config: RpcConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._stamp: _Stamp = ()

    def load(self) -> grpc.ServerCertificateConfiguration:
        config = self._config
        self._stamp = self._look()
        key, chain = read_pem(config.tls_key_path), read_pem(config.tls_cert_path)
        assert key is not None and chain is not None
        return grpc.ssl_server_certificate_configuration(
            [(key, chain)], root_certificates=read_pem(config.tls_ca_path)
        )

    def renewed(self) -> Any:
        """Asked at each handshake. None: what was given last still holds."""
        with self._lock:
            try:
                return None if self._look() == self._stamp else self.load()
            except OSError as error:  # Being replaced just now, perhaps.
                log.warning("TLS files cannot be read, the old ones are kept: %s", error)
                return None

    def _look(self) -> _Stamp:
        config = self._config
        paths = (config.tls_cert_path, config.tls_key_path, config.tls_ca_path)
        found = [os.stat(path) for path in paths if path is not None]
        return tuple((each.st_mtime_ns, each.st_ino) for each in found)
