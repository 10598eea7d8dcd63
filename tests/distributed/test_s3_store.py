"""The object store in S3, against a real one: Ceph's RGW."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ochredb.clock import SystemClock
from ochredb.crash_points import VARIABLE
from ochredb.errors import AlreadyExists, InvalidArgument, NotFound, TooLarge, Unavailable
from ochredb.ids import IdSource
from ochredb.storage import s3 as s3_module
from ochredb.storage.base import LocalStore, ObjectStore
from ochredb.storage.cached import CachedStore
from ochredb.storage.s3 import S3Config, S3Store
from ochredb.testing.server_process import HOST
from ochredb.testing.store_suite import MappableStoreSuite, StoreSuite
from tests.components.ceph import CephServer

MB = 1 << 20


def config_of(ceph: CephServer, bucket: str, **others: object) -> S3Config:
    settings: dict[str, object] = {
        "endpoint_url": ceph.url,
        "access_key_id": ceph.access_key,
        "secret_access_key": ceph.secret_key,
        "prefix": "one/deployment",
        **others,
    }
    return S3Config(bucket=bucket, **settings)  # type: ignore[arg-type]


def store_of(config: S3Config) -> S3Store:
    return S3Store(config, SystemClock(), IdSource())


@pytest.fixture
def s3(ceph: CephServer, bucket: str) -> Iterator[S3Store]:
    store = store_of(config_of(ceph, bucket))
    yield store
    store.close()


class TestS3Store(StoreSuite):
    @pytest.fixture
    def store(self, s3: S3Store) -> ObjectStore:
        return s3


class TestCachedS3Store(MappableStoreSuite):
    @pytest.fixture
    def store(self, s3: S3Store, tmp_path: Path) -> Iterator[LocalStore]:
        store = CachedStore(s3, str(tmp_path / "cache"), 64 * MB, SystemClock(), IdSource())
        yield store
        store.close()


def test_of_sixteen_threads_one_wins(s3: S3Store) -> None:
    s3.check()
    with ThreadPoolExecutor(16) as pool:
        for number in range(20):
            barrier = threading.Barrier(16)

            def attempt(
                content: bytes, key: str = f"race/{number}", barrier: threading.Barrier = barrier
            ) -> bool:
                barrier.wait()
                try:
                    s3.create(key, content)
                except AlreadyExists:
                    return False
                return True

            contents = [bytes([i]) * 10_000 for i in range(16)]
            won = list(pool.map(attempt, contents))
            assert won.count(True) == 1
            assert s3.get(f"race/{number}") == contents[won.index(True)]


def test_a_hundred_megabytes(s3: S3Store, tmp_path: Path) -> None:
    """In pieces, fetched in ranges, without a copy of the whole."""
    blocks = [os.urandom(MB - 7) for _ in range(100)]
    s3.create("parts/1/vectors", blocks)
    whole = b"".join(blocks)
    size = len(whole)
    assert s3.get("parts/1/vectors") == whole
    for start, stop in ((0, 1), (5 * MB, 50 * MB + 1), (size - 1, size), (size, size)):
        assert s3.get_range("parts/1/vectors", start, stop) == whole[start:stop]
    for start, stop in (
        (0, size + 1),
        (size, size + 1),
        (size + 1, size + 1),
        (size + 5, size + 9),
    ):
        with pytest.raises(ValueError, match="range"):
            s3.get_range("parts/1/vectors", start, stop)
    store = CachedStore(s3, str(tmp_path / "cache"), 200 * MB, SystemClock(), IdSource())
    assert bytes(store.map("parts/1/vectors")) == whole
    assert store.counters.fetched_bytes == size
    store.close()


def test_an_object_above_the_limit_is_refused(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "OBJECT_BYTES_MAX", 10)
    s3.create("small", bytes(10))
    with pytest.raises(TooLarge, match="11 bytes"):
        s3.create("large", [bytes(6), bytes(5)])
    assert [item.key for item in s3.list("")] == ["small"]


def test_more_than_one_page_is_listed(s3: S3Store) -> None:
    keys = [f"many/{number:04}" for number in range(1_130)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: s3.create(key, b""), keys))
    assert [item.key for item in s3.list("many/")] == keys
    assert [item.key for item in s3.list("many/", after="many/1099")] == keys[1_100:]


def test_many_are_deleted_at_once(s3: S3Store, tmp_path: Path) -> None:
    keys = [f"many/{number:04}" for number in range(1_100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: s3.create(key, b""), keys))
    store = CachedStore(s3, str(tmp_path / "cache"), MB, SystemClock(), IdSource())
    store.map(keys[0])
    assert store.delete_many([*keys[:1_050], "absent"]) == {}
    assert [item.key for item in s3.list("")] == keys[1_050:]
    with pytest.raises(NotFound):
        store.map(keys[0])
    store.close()


def test_deployments_with_prefixes_do_not_see_each_other(ceph: CephServer, bucket: str) -> None:
    stores = [store_of(config_of(ceph, bucket, prefix=prefix)) for prefix in ("", "a", "a/b", "ab")]
    for number, store in enumerate(stores):
        store.check()
        store.create("parts/1/x", bytes([number]))
    assert [store.get("parts/1/x") for store in stores] == [b"\0", b"\1", b"\2", b"\3"]
    assert [item.key for item in stores[3].list("")] == ["parts/1/x"]
    for store in stores:
        store.close()


def test_what_the_object_carries(s3: S3Store, ceph: CephServer, bucket: str) -> None:
    s3.create("a", b"content")
    found = ceph.client().head_object(Bucket=bucket, Key="one/deployment/a")
    assert set(found["Metadata"]) == {"ochredb-writer", "ochredb-xxh3"}


def test_a_check_leaves_nothing(s3: S3Store, ceph: CephServer, bucket: str) -> None:
    client = ceph.client()
    long_ago = IdSource(_LongAgo()).uuid7()
    client.put_object(Bucket=bucket, Key=f"one/deployment/tmp/probe/{long_ago}", Body=b"")
    young = IdSource().uuid7()
    client.put_object(Bucket=bucket, Key=f"one/deployment/tmp/probe/{young}", Body=b"")
    s3.check()
    left = [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert left == [f"one/deployment/tmp/probe/{young}"]
    assert list(s3.list("")) == []


class _LongAgo(SystemClock):
    def now_us(self) -> int:
        return super().now_us() - 3_600_000_000


def test_a_bucket_that_is_not_there(ceph: CephServer) -> None:
    store = store_of(config_of(ceph, "no-such-bucket"))
    with pytest.raises(InvalidArgument, match=r"^object_store_url: .*bucket no-such-bucket at"):
        store.check()
    with pytest.raises(Unavailable, match="NoSuchBucket"):
        store.create("a", b"x")
    with pytest.raises(Unavailable, match="no such bucket"):
        store.get("a")
    store.close()


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("secret_access_key", r"\(the secret key is wrong"),
        ("access_key_id", r"\(the access key is not known there"),
    ],
)
def test_wrong_credentials(ceph: CephServer, bucket: str, setting: str, hint: str) -> None:
    store = store_of(config_of(ceph, bucket, **{setting: "wrong"}))
    with pytest.raises(InvalidArgument, match=rf"^s3_{setting}: .*403.*{hint}"):
        store.check()
    calls: list[Callable[[], object]] = [
        lambda: store.create("a", b"x"),
        lambda: store.get("a"),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
    ]
    for call in calls:
        with pytest.raises(Unavailable, match=f"403.*{hint}"):
            call()
    of_a_head = r": 403, Forbidden \(the access key or its secret is wrong, or may not do this\)"
    with pytest.raises(Unavailable, match=of_a_head):
        store.get_range("a", 0, 0)
    assert isinstance(store.delete_many(["a", "b"])["b"], Unavailable)
    store.close()


def test_an_endpoint_that_is_not_there(ceph: CephServer, bucket: str) -> None:
    config = config_of(ceph, bucket, endpoint_url="http://127.0.0.1:9", deadline_s=0.3)
    store = store_of(config)
    for call in (store.check, lambda: store.create("a", b"x"), lambda: store.get("a")):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
            call()
    store.close()


class _Forgetful(http.server.BaseHTTPRequestHandler):
    """An endpoint that knows PUT, GET, HEAD, DELETE and lists, and no condition."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, dict[str, str]]]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        named = {k: v for k, v in self.headers.items() if k.lower().startswith("x-amz-meta-")}
        self.objects[self.path] = body, named
        self._answer(200, b"", {"ETag": '"1"'})

    def do_GET(self) -> None:
        if "list-type" in self.path:
            self._answer(200, b"<ListBucketResult></ListBucketResult>", {})
            return
        found = self.objects.get(self.path)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        else:
            size = len(found[0])
            headers = {**found[1], "Content-Range": f"bytes 0-{size - 1}/{size}"}
            self._answer(206, found[0], headers)

    def do_HEAD(self) -> None:
        found = self.objects.get(self.path, (b"", {}))
        is_there = self.path in self.objects or self.path.count("/") == 1
        self._answer(200 if is_there else 404, b"", found[1])

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204, b"", {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""


def test_an_endpoint_that_lets_writers_replace_objects_is_refused(
    ceph: CephServer, bucket: str
) -> None:
    _Forgetful.objects = {}
    with http.server.ThreadingHTTPServer((HOST, 0), _Forgetful) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://{HOST}:{server.server_address[1]}"
        store = store_of(config_of(ceph, bucket, endpoint_url=url))
        with pytest.raises(InvalidArgument, match="does not honour If-None-Match"):
            store.check()
        assert _Forgetful.objects == {}
        store.check(writes=False)
        store.close()
        server.shutdown()


def test_without_boto3_it_says_what_to_install(
    ceph: CephServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    store = store_of(config_of(ceph, "bucket"))
    with pytest.raises(InvalidArgument, match=r"pip install 'ochredb\[cluster\]'"):
        store.check()


def test_both_sides_of_a_fork_use_it(s3: S3Store) -> None:
    s3.create("a", b"x" * 20 * MB)
    child = os.fork()
    if child == 0:
        good = len(s3.get("a")) == 20 * MB
        s3.create("b", b"of the child")
        os._exit(0 if good else 1)
    assert len(s3.get("a")) == 20 * MB
    assert os.waitpid(child, 0)[1] == 0
    assert s3.get("b") == b"of the child"


_WORKER = """
import os, sys
from ochredb.clock import SystemClock
from ochredb.ids import IdSource
from ochredb.storage.s3 import S3Config, S3Store
config = S3Config.from_url(sys.argv[1], endpoint_url=sys.argv[2], access_key_id=sys.argv[3],
                           secret_access_key=sys.argv[4])
store = S3Store(config, SystemClock(), IdSource())
for key in sys.argv[5:]:
    try:
        store.create(key, key.encode() * 1000)
    except Exception as error:
        print(type(error).__name__, flush=True)
    else:
        print(key, flush=True)
"""


@pytest.mark.parametrize(
    ("point", "told", "there"),
    [
        ("s3.creating", [], []),
        ("s3.created", [], ["a"]),
        ("s3.creating:2", ["a"], ["a"]),
        ("s3.created:2", ["a"], ["a", "b"]),
        ("s3.resolving", ["a", "b"], ["a", "b"]),  # Of the second "a".
    ],
)
def test_a_writer_that_is_killed(
    ceph: CephServer, bucket: str, s3: S3Store, point: str, told: list[str], there: list[str]
) -> None:
    """What was acknowledged is there, and nothing else but the object of that moment."""
    url = f"s3://{bucket}/one/deployment"
    command = [sys.executable, "-c", _WORKER, url, ceph.url, ceph.access_key, ceph.secret_key]
    ended = subprocess.run(
        [*command, "a", "b", "a"],
        env={**os.environ, VARIABLE: point},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout.split() == told
    assert [item.key for item in s3.list("")] == there
    for key in there:
        assert s3.get(key) == key.encode() * 1000


def test_settings_are_checked() -> None:
    config = S3Config.from_url("s3://bucket/a/b/", region="eu-west-1")
    assert (config.bucket, config.prefix, config.region) == ("bucket", "a/b", "eu-west-1")
    assert S3Config.from_url("s3://bucket").prefix == ""
    secret = S3Config(bucket="bucket", access_key_id="k", secret_access_key="hush")
    assert "hush" not in repr(secret)
    assert "hush" not in repr(replace(secret, secret_access_key="k", session_token="hush"))
    wrong: list[Callable[[], object]] = [
        lambda: S3Config.from_url("https://bucket/a"),
        lambda: S3Config.from_url("s3://"),
        lambda: S3Config.from_url("s3://bucket/a//b"),
        lambda: S3Config.from_url("s3://bucket/ä"),
        lambda: S3Config(bucket="b", endpoint_url="http://x"),
        lambda: S3Config(bucket="bucket", endpoint_url="localhost:9000"),
        lambda: S3Config(bucket="bucket", kms_key_id="k"),
        lambda: S3Config(bucket="bucket", access_key_id="k"),
        lambda: S3Config(bucket="bucket", session_token="t"),
        lambda: S3Config(bucket="bucket", deadline_s=0.0),
        lambda: S3Config(bucket="bucket", addressing="other"),  # type: ignore[arg-type]
        lambda: S3Config(bucket="bucket", encryption="rot13"),  # type: ignore[arg-type]
    ]
    for make in wrong:
        with pytest.raises(InvalidArgument):
            make()
