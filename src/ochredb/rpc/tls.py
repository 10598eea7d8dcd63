"""Certificates of both sides that are renewed while they are used: files that were replaced are
noticed by a server at the next handshake, by a client when it is asked to look."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import grpc

from ochredb.errors import InvalidArgument, Unavailable
from ochredb.pem import check_authority, check_pair
from ochredb.rpc.channel import read_pem
from ochredb.rpc.config import RpcConfig

log = logging.getLogger("ochredb.rpc")

_Stamp = tuple[tuple[int, int], ...]


def server_credentials(config: RpcConfig) -> grpc.ServerCredentials:
    """With an authority: clients must show a certificate of it. Raises InvalidArgument."""
    files = _ServerFiles(config)
    try:
        first = files.load()
    except (OSError, ValueError, Unavailable) as error:
        raise InvalidArgument(f"TLS cannot be spoken: {error}") from error
    return grpc.dynamic_ssl_server_credentials(
        first, files.renewed, require_client_authentication=config.tls_ca_path is not None
    )


class _Files:
    """The PEM files, and what they were when they were last looked at."""

    def __init__(self, config: RpcConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._stamp: _Stamp = ()

    def _look(self) -> _Stamp:
        config = self._config
        paths = (config.tls_cert_path, config.tls_key_path, config.tls_ca_path)
        found = [os.stat(path) for path in paths if path is not None]
        return tuple((each.st_mtime_ns, each.st_ino) for each in found)

    def _check(self) -> None:
        """Raises ValueError that names what cannot be used."""
        config = self._config
        if config.tls_cert_path is not None and config.tls_key_path is not None:
            check_pair(config.tls_cert_path, config.tls_key_path)
        if config.tls_ca_path is not None:
            check_authority(config.tls_ca_path)


class _ServerFiles(_Files):
    def load(self) -> grpc.ServerCertificateConfiguration:
        config = self._config
        self._stamp = self._look()
        self._check()
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
            except (OSError, ValueError, Unavailable) as error:  # Being replaced just now, perhaps.
                log.warning("the old TLS files are kept: %s", error)
                return None


class ClientFiles(_Files):
    """Of the clients of a process, whose connections keep what they were made with."""

    def __init__(self, config: RpcConfig) -> None:
        """They are taken as they are now. Raises InvalidArgument if they cannot be used."""
        super().__init__(config)
        try:
            self._stamp = self._look()
            self._check()
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"TLS cannot be spoken: {error}") from error

    def are_renewed(self) -> bool:
        """Whether others that can be used are there since this was last asked."""
        with self._lock:
            try:
                found = self._look()
                if found == self._stamp:
                    return False
                self._stamp = found
                self._check()
            except (OSError, ValueError) as error:  # Being replaced just now, perhaps.
                log.warning("the old TLS files are kept: %s", error)
                return False
            return True
