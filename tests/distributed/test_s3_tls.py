"""The object store by TLS, against a real endpoint with a certificate of a private authority:
trust, encryption, buckets as names of hosts, and connections that break."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ochredb.errors import InvalidArgument, Unavailable
from ochredb.storage.s3 import S3Store
from tests.components.ceph import CephServer
from tests.components.certificates import Authority
from tests.components.tcp_proxy import TcpProxy

from .test_s3_store import MB, config_of, store_of


@pytest.fixture
def settings(ceph: CephServer) -> dict[str, Any]:
    return {"endpoint_url": ceph.tls_url, "ca_bundle": ceph.authority.ca}


def _used(store: S3Store) -> None:
    """Whatever is asked of a store."""
    store.check()
    large = bytes(range(256)) * (20 * MB // 256)
    store.create("parts/1/small", b"content")
    store.create("parts/1/large", large)
    assert store.get("parts/1/small") == b"content"
    assert store.get("parts/1/large") == large
    assert store.get_range("parts/1/large", 9 * MB, 9 * MB + 5) == large[:5]
    assert [item.key for item in store.list("parts/")] == ["parts/1/large", "parts/1/small"]
    store.delete("parts/1/small")
    assert store.delete_many(["parts/1/large"]) == {}
    assert list(store.list("")) == []
    store.close()


def test_a_private_authority_is_trusted_if_it_is_given(
    ceph: CephServer, bucket: str, settings: dict[str, Any]
) -> None:
    _used(store_of(config_of(ceph, bucket, **settings)))


@pytest.mark.parametrize("other", [False, True], ids=["none", "another"])
def test_whom_nobody_vouches_for_is_refused(
    ceph: CephServer, bucket: str, settings: dict[str, Any], tmp_path: Path, other: bool
) -> None:
    """At once: waiting does not help. With the setting that would."""
    settings["ca_bundle"] = Authority.make(tmp_path / "other").ca if other else None
    store = store_of(config_of(ceph, bucket, **settings))
    with pytest.raises(InvalidArgument, match=r"^s3_ca_path: .*CERTIFICATE_VERIFY_FAILED"):
        store.check()
    with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
        store.create("a", b"x")
    store.close()


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint's names are known, as if a name service said so."""
    resolved = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        known = isinstance(host, str) and host.endswith(CephServer.domain)
        return resolved("127.0.0.1" if known else host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize("addressing", ["virtual", "path"])
def test_buckets_are_names_of_hosts_or_paths(
    ceph: CephServer, bucket: str, settings: dict[str, Any], addressing: str
) -> None:
    settings["endpoint_url"] = f"https://{ceph.domain}:{ceph.tls_port}"
    store = store_of(config_of(ceph, bucket, addressing=addressing, **settings))
    urls: list[str] = []
    events = store._client().meta.events
    events.register("before-send.s3.PutObject", lambda request, **_: urls.append(request.url))
    _used(store)
    host = f"{bucket}.{ceph.domain}" if addressing == "virtual" else ceph.domain
    assert urls and all(url.startswith(f"https://{host}:") for url in urls)


def test_objects_are_encrypted_with_a_key_of_the_endpoint(
    ceph: CephServer, bucket: str, settings: dict[str, Any]
) -> None:
    given = {**settings, "encryption": "aws:kms", "kms_key_id": ceph.kms_key}
    store = store_of(config_of(ceph, bucket, **given))
    store.create("a", b"content")
    client = store._client()
    found = client.head_object(Bucket=bucket, Key="one/deployment/a")
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", ceph.kms_key)
    store.delete("a")
    _used(store)
    unknown = store_of(config_of(ceph, bucket, **{**given, "kms_key_id": "no-such-key"}))
    with pytest.raises(Unavailable, match="cannot create"):
        unknown.create("b", b"content")
    unknown.close()


def test_objects_are_encrypted_with_the_endpoint_s_own_key_if_it_has_one(
    ceph: CephServer, bucket: str, settings: dict[str, Any]
) -> None:
    """This one has none, and takes the wish; that it is told of each object is seen here."""
    store = store_of(config_of(ceph, bucket, encryption="AES256", **settings))
    told: list[bytes] = []
    events = store._client().meta.events
    name = "x-amz-server-side-encryption"
    events.register(
        "before-send.s3.PutObject", lambda request, **_: told.append(request.headers[name])
    )
    _used(store)
    assert set(told) == {b"AES256"} and len(told) >= 4


@pytest.fixture
def proxy(ceph: CephServer) -> Iterator[TcpProxy]:
    proxy = TcpProxy.start([("127.0.0.1", ceph.tls_port)])
    yield proxy
    proxy.stop()


@pytest.mark.parametrize("in_order", [False, True], ids=["reset", "closed"])
@pytest.mark.parametrize("count", [1, 700, 1_500, 2_000, 100_000])
def test_a_connection_that_breaks_at_any_byte_is_no_refusal(
    ceph: CephServer,
    bucket: str,
    settings: dict[str, Any],
    proxy: TcpProxy,
    count: int,
    in_order: bool,
) -> None:
    """In the handshake or in an answer: it is tried again, and created once."""
    settings["endpoint_url"] = f"https://{proxy.address}"
    content = bytes(300_000)
    direct = store_of(config_of(ceph, bucket))
    direct.create("there", content)
    calls: list[Callable[[S3Store], object]] = [
        lambda store: store.create("a", content),
        lambda store: store.get("there"),
    ]
    for call in calls:
        store = store_of(config_of(ceph, bucket, **settings))
        broken = proxy.counts["resets"]
        proxy.reset_after_bytes, proxy.in_order = count, in_order
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(call, store)
            while not running.done() and proxy.counts["resets"] < broken + 2:
                time.sleep(0.01)
            proxy.heal()
            assert running.result() in (None, content)
        store.close()
    assert direct.get("a") == content
    direct.close()
