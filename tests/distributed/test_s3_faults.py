"""The object store when S3 fails: nothing acknowledged is lost, and nothing is told wrongly."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ochredb.clock import SystemClock
from ochredb.errors import AlreadyExists, NotFound, OchreError, Unavailable
from ochredb.ids import IdSource
from ochredb.storage import s3 as s3_module
from ochredb.storage.cached import CachedStore
from ochredb.storage.s3 import S3Store
from tests.components.ceph import CephServer
from tests.components.s3_faults import Plan, S3Faults
from tests.distributed.test_s3_store import config_of, store_of

MB = 1 << 20


@pytest.fixture
def faults(ceph: CephServer) -> Iterator[S3Faults]:
    proxy = S3Faults.start(ceph.url, seed=11)
    yield proxy
    proxy.stop()


@pytest.fixture
def s3(ceph: CephServer, bucket: str) -> Iterator[S3Store]:
    """Without faults."""
    store = store_of(config_of(ceph, bucket))
    yield store
    store.close()


def behind(faults: S3Faults, ceph: CephServer, bucket: str, **others: object) -> S3Store:
    return store_of(config_of(ceph, bucket, endpoint_url=faults.url, **others))


class Writers:
    """Threads that create objects under keys of their own and under keys that all want."""

    def __init__(self, store: S3Store, seed: int) -> None:
        self.store, self.seed = store, seed
        self.lock = threading.Lock()
        self.acknowledged: dict[str, bytes] = {}
        self.told: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, threads: int, each: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(self._work, number, each) for number in range(threads)]:
                done.result()

    def _work(self, number: int, each: int) -> None:
        rng = random.Random(f"{self.seed}-{number}")
        for index in range(each):
            is_shared = rng.random() < 0.3
            key = f"shared/{index}" if is_shared else f"own/{number}/{index}"
            content = f"{number} {index} ".encode() * rng.choice((1, 50, 5_000))
            try:
                self.store.create(key, content)
            except AlreadyExists:
                self._note("exists")
                if not is_shared:
                    self.problems.append(f"{key} is told to exist: nobody else wants it")
            except Unavailable:
                self._note("unavailable")
            else:
                self._note("created")
                with self.lock:
                    if key in self.acknowledged:
                        self.problems.append(f"{key} was created twice")
                    self.acknowledged[key] = content

    def _note(self, what: str) -> None:
        with self.lock:
            self.told[what] += 1


@pytest.mark.parametrize(
    ("share", "threads", "each"), [(0.05, 16, 120), (0.15, 16, 60), (0.30, 16, 40)]
)
def test_creates_under_faults(
    ceph: CephServer, bucket: str, s3: S3Store, faults: S3Faults,
    share: float, threads: int, each: int,
) -> None:  # fmt: skip
    """Thousands of them; each of the faults before, after and in the middle."""
    store = behind(faults, ceph, bucket)
    faults.fail_before = faults.fail_after = 0.4 * share
    faults.reset_body = 0.2 * share
    writers = Writers(store, seed=3)
    writers.run(threads, each)
    faults.calm()
    assert writers.problems == []
    listed = {item.key for item in s3.list("")}
    assert listed >= writers.acknowledged.keys()
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(listed, pool.map(s3.get, listed), strict=True))
    wrong = [key for key, content in writers.acknowledged.items() if found[key] != content]
    assert wrong == []
    assert writers.told["created"] > 0.5 * threads * each
    assert writers.told["unavailable"] == 0, writers.told  # There is time for many attempts.
    assert writers.told["exists"] > 0
    assert min(faults.counts[kind] for kind in ("before", "after", "reset")) > 5, faults.counts
    store.close()


def test_a_lost_reply_is_no_existing_object(
    ceph: CephServer, bucket: str, faults: S3Faults
) -> None:
    """Every PUT's reply is lost, each way of losing it: every create succeeds all the same."""
    store = behind(faults, ceph, bucket)
    faults.methods = frozenset({"PUT"})
    faults.fail_after = 1.0
    for number in range(30):
        store.create(f"a/{number}", b"x" * number)
    for number in range(30):
        with pytest.raises(AlreadyExists):
            store.create(f"a/{number}", b"x" * number)
    faults.calm()
    assert [item.size for item in sorted(store.list("a/"), key=lambda i: i.size)] == [*range(30)]
    store.close()


def test_an_outcome_that_cannot_be_found_out_is_unavailable(
    ceph: CephServer, bucket: str, s3: S3Store, faults: S3Faults
) -> None:
    store = behind(faults, ceph, bucket, deadline_s=0.5)
    faults.fail_after = 1.0
    with pytest.raises(Unavailable):
        store.create("a", b"content")
    faults.fail_after, faults.fail_before = 0.0, 1.0
    with pytest.raises(Unavailable):
        store.create("b", b"content")
    faults.calm()
    assert s3.get("a") == b"content"
    with pytest.raises(NotFound):
        s3.get("b")
    store.close()


def test_reads_lists_and_deletes_under_faults(
    ceph: CephServer, bucket: str, s3: S3Store, faults: S3Faults, tmp_path: Path
) -> None:
    contents = {f"parts/{number}/x": os.urandom(number * 1_500) for number in range(40)}
    contents["parts/large/x"] = os.urandom(40 * MB)
    for key, content in contents.items():
        s3.create(key, content)
    store = behind(faults, ceph, bucket)
    faults.fail_before = faults.fail_after = faults.reset_body = 0.08
    rng = random.Random(1)
    for _ in range(2):
        assert [item.key for item in store.list("parts/")] == sorted(contents)
        for key, content in contents.items():
            assert store.get(key) == content
            start, stop = sorted(rng.choices(range(len(content) + 1), k=2))
            assert store.get_range(key, start, stop) == content[start:stop]
    cache = CachedStore(store, str(tmp_path / "cache"), 100 * MB, SystemClock(), IdSource())
    for key, content in contents.items():
        assert bytes(cache.map(key)) == content
    cache.close()
    for key in list(contents)[:20]:
        store.delete(key)
    assert store.delete_many(list(contents)) == {}
    assert list(s3.list("")) == []
    assert faults.counts["reset"] > 10
    store.close()


def test_slow_answers_are_given_up_and_asked_for_again(
    ceph: CephServer, bucket: str, faults: S3Faults
) -> None:
    store = behind(faults, ceph, bucket, read_timeout_s=0.3)
    faults.delay_s, faults.delay_share = 1.5, 0.3
    for number in range(10):
        store.create(f"a/{number}", b"x")
        assert store.get(f"a/{number}") == b"x"
    assert faults.counts["delayed"] > 3
    faults.calm()
    time.sleep(1.5)  # What was given up lands, at last, on what is there.
    assert len(list(store.list("a/"))) == 10
    store.close()


def test_the_endpoint_is_killed_under_load(ceph: CephServer, bucket: str) -> None:
    """kill -9, of the gateway and then of everything: what was acknowledged is there, whole."""
    store = store_of(config_of(ceph, bucket, deadline_s=120.0))
    acknowledged: dict[str, bytes] = {}
    problems: list[str] = []
    stop = threading.Event()

    def write(number: int) -> None:
        rng = random.Random(number)
        index = 0
        while not stop.is_set():
            key = f"{number}/{index}"
            content = rng.randbytes(rng.choice((100, 20_000, 300_000)))
            index += 1
            try:
                store.create(key, content)
            except OchreError as error:
                problems.append(f"{key}: {error!r}")
                return
            acknowledged[key] = content

    def wait_for(count: int) -> None:
        until_s = time.monotonic() + 60
        while len(acknowledged) < count and time.monotonic() < until_s and not problems:
            time.sleep(0.05)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for victims in (("rgw",), ("rgw", "osd", "monitor")):
        wait_for(len(acknowledged) + 50)
        ceph.kill(*victims)
        ceph.restart()
        wait_for(len(acknowledged) + 50)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(acknowledged) > 200
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(acknowledged, pool.map(store.get, acknowledged), strict=True))
    assert [key for key in acknowledged if found[key] != acknowledged[key]] == []
    store.close()


def test_ranges_are_fetched_side_by_side(
    ceph: CephServer, bucket: str, s3: S3Store, faults: S3Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a read, all but the first, which tells the size; none is answered before all are asked."""
    piece = s3_module._RANGE_BYTES
    content = os.urandom(MB) * (4 * piece // MB)
    s3.create("parts/1/vectors", content)
    store = behind(faults, ceph, bucket)
    asked, alone = itertools.count(1), []
    everybody = threading.Barrier(3)

    def plan(method: str) -> Plan:
        if method == "GET" and next(asked) > 1:
            try:
                everybody.wait(20.0)
            except threading.BrokenBarrierError:
                alone.append(method)
        return Plan("passed", 0, 0.0)

    monkeypatch.setattr(faults, "plan", plan)
    assert store.get("parts/1/vectors") == content
    assert not alone
    found: list[tuple[int, int]] = []

    def take(offset: int, data: memoryview) -> None:
        found.append((offset, len(data)))

    ranges = [(0, piece), (piece, 3 * piece)]
    store.download_ranges("parts/1/vectors", len(content), ranges, take)
    assert sum(size for _, size in found) == 3 * piece
    assert not alone
    store.close()
