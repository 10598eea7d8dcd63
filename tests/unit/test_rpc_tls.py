"""TLS between the roles: who is trusted, who must show a certificate, and renewed files."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest

from ochredb.cancel import Cancel
from ochredb.clock import SystemClock
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.peers import QueryNode
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.server import RpcServer
from ochredb_query.grpc import QueryServicer

from .rpc_kernel import connected


class _Counting:
    """A query role."""

    def count(self, _collection_id: str, *, cancel: Cancel) -> int:
        return 7


@dataclass(frozen=True, slots=True)
class _Authority:
    """A certificate authority of the test's own, in a folder."""

    folder: Path

    @property
    def ca(self) -> str:
        return str(self.folder / "ca.pem")

    def certificate(self, name: str, address: str) -> tuple[str, str]:
        """A certificate for `address` ("IP:127.0.0.1" or "DNS:name") and its key, as paths."""
        key, request = self.folder / f"{name}.key", self.folder / f"{name}.csr"
        certificate, extension = self.folder / f"{name}.pem", self.folder / f"{name}.ext"
        extension.write_text(f"subjectAltName={address}\n")
        _openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                 "-nodes", "-keyout", str(key), "-out", str(request),
                 "-subj", f"/CN={name}")  # fmt: skip
        _openssl("x509", "-req", "-in", str(request), "-CA", self.ca,
                 "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial", "-days", "2",
                 "-extfile", str(extension), "-out", str(certificate))  # fmt: skip
        return str(certificate), str(key)


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def _authority(folder: Path) -> _Authority:
    folder.mkdir()
    _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.pem"),
             "-days", "2", "-subj", "/CN=authority")  # fmt: skip
    return _Authority(folder)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> _Authority:
    return _authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> _Authority:
    return _authority(tmp_path_factory.mktemp("tls") / "theirs")


@contextlib.contextmanager
def _server(config: RpcConfig) -> Iterator[RpcServer]:
    server = RpcServer(config, clock=SystemClock())
    server.add(QueryServicer(cast("QueryNode", _Counting()), config))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _answers(address: str, config: RpcConfig) -> bool:
    with connected(address, config) as (_, query):
        try:
            return query.count("c", cancel=Cancel(20)) == 7
        except Unavailable:
            return False


def _config(authority: _Authority, name: str, *, mutual: bool) -> RpcConfig:
    certificate, key = authority.certificate(name, "IP:127.0.0.1")
    ca = authority.ca if mutual else None
    return RpcConfig(tls_cert_path=certificate, tls_key_path=key, tls_ca_path=ca)


def test_a_server_with_a_certificate(authority: _Authority, stranger: _Authority) -> None:
    with _server(_config(authority, "server", mutual=False)) as server:
        assert _answers(server.address, RpcConfig(tls_ca_path=authority.ca))
        assert not _answers(server.address, RpcConfig(tls_ca_path=stranger.ca))
        assert not _answers(server.address, RpcConfig()), "without TLS"


def test_a_server_that_wants_certificates(authority: _Authority, stranger: _Authority) -> None:
    ours = _config(authority, "mutual", mutual=True)
    with _server(ours) as server:
        assert _answers(server.address, ours)
        assert not _answers(server.address, RpcConfig(tls_ca_path=authority.ca)), "without one"
        certificate, key = stranger.certificate("client", "IP:127.0.0.1")
        theirs = replace(ours, tls_cert_path=certificate, tls_key_path=key)
        assert not _answers(server.address, theirs), "one of another authority"


def test_the_name_in_the_certificate_counts(authority: _Authority) -> None:
    certificate, key = authority.certificate("named", "DNS:query.ochredb.local")
    with _server(RpcConfig(tls_cert_path=certificate, tls_key_path=key)) as server:
        client = RpcConfig(tls_ca_path=authority.ca)
        assert not _answers(server.address, client)
        assert not _answers(server.address, replace(client, tls_server_name="other.local"))
        assert _answers(server.address, replace(client, tls_server_name="query.ochredb.local"))


def test_renewed_files_are_noticed(authority: _Authority, stranger: _Authority) -> None:
    config = _config(authority, "renewed", mutual=False)
    before, after = (RpcConfig(tls_ca_path=each.ca) for each in (authority, stranger))
    with _server(config) as server:
        assert _answers(server.address, before)
        fresh = stranger.certificate("fresh", "IP:127.0.0.1")
        for source, target in zip(fresh, (config.tls_cert_path, config.tls_key_path), strict=True):
            assert target is not None
            os.replace(source, target)
        assert _answers(server.address, after)
        assert not _answers(server.address, before)
        os.remove(str(config.tls_key_path))
        assert _answers(server.address, after), "files that are gone for a moment"


def test_files_that_cannot_be_read(authority: _Authority, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    server = RpcServer(RpcConfig(tls_cert_path=missing, tls_key_path=missing), clock=SystemClock())
    with pytest.raises(InvalidArgument, match="missing"):
        server.start()
    with pytest.raises(ValueError, match="go together"):
        RpcConfig(tls_cert_path=missing)


def test_threads_end_with_their_server(authority: _Authority) -> None:
    def ours() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name.startswith("rpc-")]

    with _server(_config(authority, "ending", mutual=True)) as server:
        assert _answers(server.address, _config(authority, "ending-2", mutual=True))
        assert ours()
    for _ in range(2_000):
        if not ours():
            break
        threading.Event().wait(0.005)
    assert ours() == []
