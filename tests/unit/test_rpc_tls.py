"""TLS between the roles: who is trusted, who must show a certificate, and renewed files."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from ochredb.cancel import Cancel
from ochredb.clock import SystemClock
from ochredb.cluster.membership import StaticMembership
from ochredb.cluster.nodes import Nodes
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.peers import QueryNode
from ochredb.pem import check_authority, check_pair
from ochredb.rpc.channel import channel
from ochredb.rpc.config import RpcConfig
from ochredb.rpc.server import RpcServer
from ochredb.rpc.tls import ClientFiles
from ochredb_query.grpc import QueryServicer
from tests.components.certificates import Authority, openssl

from .rpc_kernel import connected


class _Counting:
    """A query role."""

    def count(self, _collection_id: str, *, cancel: Cancel) -> int:
        return 7


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "theirs")


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


def _config(authority: Authority, name: str, *, mutual: bool) -> RpcConfig:
    certificate, key = authority.certificate(name, "IP:127.0.0.1")
    ca = authority.ca if mutual else None
    return RpcConfig(tls_cert_path=certificate, tls_key_path=key, tls_ca_path=ca)


def test_a_server_with_a_certificate(authority: Authority, stranger: Authority) -> None:
    with _server(_config(authority, "server", mutual=False)) as server:
        assert _answers(server.address, RpcConfig(tls_ca_path=authority.ca))
        assert not _answers(server.address, RpcConfig(tls_ca_path=stranger.ca))
        assert not _answers(server.address, RpcConfig()), "without TLS"


def test_a_server_that_wants_certificates(authority: Authority, stranger: Authority) -> None:
    ours = _config(authority, "mutual", mutual=True)
    with _server(ours) as server:
        assert _answers(server.address, ours)
        assert not _answers(server.address, RpcConfig(tls_ca_path=authority.ca)), "without one"
        certificate, key = stranger.certificate("client", "IP:127.0.0.1")
        theirs = replace(ours, tls_cert_path=certificate, tls_key_path=key)
        assert not _answers(server.address, theirs), "one of another authority"


def test_the_name_in_the_certificate_counts(authority: Authority) -> None:
    certificate, key = authority.certificate("named", "DNS:query.ochredb.local")
    with _server(RpcConfig(tls_cert_path=certificate, tls_key_path=key)) as server:
        client = RpcConfig(tls_ca_path=authority.ca)
        assert not _answers(server.address, client)
        assert not _answers(server.address, replace(client, tls_server_name="other.local"))
        assert _answers(server.address, replace(client, tls_server_name="query.ochredb.local"))


def test_renewed_files_are_noticed(authority: Authority, stranger: Authority) -> None:
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


def test_files_that_cannot_be_read(authority: Authority, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    server = RpcServer(RpcConfig(tls_cert_path=missing, tls_key_path=missing), clock=SystemClock())
    with pytest.raises(InvalidArgument, match="missing"):
        server.start()
    with pytest.raises(ValueError, match="go together"):
        RpcConfig(tls_cert_path=missing)


def test_files_that_are_no_certificates_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.certificate("good", "IP:127.0.0.1")
    _, other_key = authority.certificate("other", "IP:127.0.0.1")
    empty, locked = tmp_path / "empty.pem", tmp_path / "locked.key"
    empty.write_text("")
    openssl("ec", "-in", key, "-aes128", "-passout", "pass:x", "-out", str(locked))
    check_pair(certificate, key)
    check_authority(authority.ca)
    for pair, named in (
        ((str(empty), key), f"{empty} holds no certificate"),
        ((certificate, str(empty)), f"{empty} holds no key"),
        ((certificate, other_key), f"{other_key} holds no key .* of the certificate"),
        ((certificate, str(locked)), f"{locked} holds no key .*not encrypted"),
    ):
        with pytest.raises(ValueError, match=named):
            check_pair(*pair)
        config = RpcConfig(tls_cert_path=pair[0], tls_key_path=pair[1])
        with pytest.raises(InvalidArgument, match=named):
            RpcServer(config, clock=SystemClock()).start()
        with pytest.raises(InvalidArgument, match=named):
            ClientFiles(config)
    with pytest.raises(ValueError, match=r"none holds no key .*No such file"):
        check_pair(certificate, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"empty\.pem holds no certificate"):
        check_authority(str(empty))


def test_clients_are_made_anew_when_files_are_renewed(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The calls of the old ones end on them."""
    config = _config(authority, "client", mutual=True)
    assert config.tls_key_path is not None
    files = ClientFiles(config)
    made: list[str] = []
    closed: list[str] = []

    def connect(_address: str) -> str:
        made.append(f"client {len(made)}")
        return made[-1]

    nodes = Nodes(
        StaticMembership({"a": "h:1"}), connect,
        clock=SystemClock(), rng=random.Random(1), close=closed.append,
    )  # fmt: skip
    (old,) = nodes.ordered("c")
    old.trying()
    assert (old.client, files.are_renewed()) == ("client 0", False)
    os.replace(authority.certificate("another", "IP:127.0.0.1")[1], config.tls_key_path)
    assert not files.are_renewed(), "it is not the certificate's key"
    assert "the old TLS files are kept" in caplog.text
    _config(authority, "client", mutual=True)
    assert files.are_renewed()
    assert not files.are_renewed()
    nodes.renew()
    (fresh,) = nodes.ordered("c")
    assert (fresh.client, closed) == ("client 1", [])
    old.succeeded()
    assert closed == ["client 0"]
    nodes.close()
    assert closed == made


def test_a_client_whose_files_are_gone_says_so(authority: Authority) -> None:
    config = _config(authority, "gone", mutual=True)
    assert config.tls_key_path is not None
    os.remove(config.tls_key_path)
    with pytest.raises(Unavailable, match=r"gone\.key cannot be read: No such file") as caught:
        channel("127.0.0.1:1", config)
    assert caught.value.detail["unreachable"], "another node may be asked"


def test_threads_end_with_their_server(authority: Authority) -> None:
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
