"""A node whose objects lie in S3, behind its cache: the same answers, and no object too many."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ochredb.errors import InvalidArgument, Unavailable
from ochredb.ids import IdSource
from ochredb.integrity.check import check_store
from ochredb.storage.cached import CachedStore
from ochredb.storage.s3 import S3Config, S3Store
from ochredb.types import Op
from ochredb_compactor.config import CompactorConfig
from ochredb_log.config import LogConfig
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node
from tests.components.ceph import CephServer
from tests.components.s3_faults import S3Faults
from tests.distributed.served import Served
from tests.distributed.test_s3_store import config_of
from tests.unit.kernel import (
    ManualClock,
    add_rows,
    all_rows,
    append,
    make_collection,
    object_keys,
    operations,
)


@contextmanager
def node_on(folder: Path, s3: S3Config, clock: ManualClock) -> Iterator[Node]:
    config = NodeConfig(
        path=str(folder / "catalog"),
        s3=s3,
        cache_path=str(folder / "cache"),
        log=LogConfig(inline_bytes_max=0),
        compactor=CompactorConfig(graph_threads=1),
    )
    node = Node(config, clock=clock, ids=IdSource(clock))
    node.start(background=False)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def cache_of(node: Node) -> CachedStore:
    assert isinstance(node.store, CachedStore)
    return node.store


def referenced(node: Node) -> set[str]:
    with node.database.read() as session:
        connection = session.connection  # type: ignore[attr-defined]
        return {key for (key,) in connection.execute("SELECT key FROM object_references")}


def work(node: Node, collection: str, rounds: int) -> None:
    """Whatever fails is done again, as a client would."""

    def insist(call: object) -> None:
        for attempt in range(50):
            try:
                call()  # type: ignore[operator]
                return
            except Unavailable:
                assert attempt < 49

    for number in range(rounds):
        insist(lambda first=100 * number: add_rows(node, collection, first, 100))
        gone = [f"id-{100 * number + place}" for place in range(10)]
        insist(lambda ids=gone: append(node, collection, operations(Op.DELETE, ids)))
        insist(lambda: node.compactor.compact_now(collection))
        assert len(all_rows(node, collection)) == 90 * (number + 1)


def test_work_under_faults_leaves_exactly_what_is_referenced(
    ceph: CephServer, bucket: str, clock: ManualClock, tmp_path: Path
) -> None:
    faults = S3Faults.start(ceph.url, seed=5)
    s3 = config_of(ceph, bucket, endpoint_url=faults.url)
    with node_on(tmp_path, s3, clock) as node:
        faults.fail_before = faults.fail_after = faults.reset_body = 0.12
        kept, dropped = make_collection(node, "kept"), make_collection(node, "dropped")
        work(node, kept, 16)
        work(node, dropped, 4)
        expected = all_rows(node, kept)
        node.namespace.delete_collection("default_tenant", "default_database", "dropped")
        faults.calm()
        for _ in range(3):
            clock.advance(61)
            node.compactor.collect_now(sweep_orphans=True)
        assert object_keys(node) == referenced(node)
        assert all_rows(node, kept) == expected
    assert sum(faults.counts[kind] for kind in ("before", "after", "reset")) > 20
    faults.stop()


def test_a_restart_answers_from_its_cache_and_mends_it(
    ceph: CephServer, bucket: str, clock: ManualClock, tmp_path: Path
) -> None:
    s3 = config_of(ceph, bucket)
    with node_on(tmp_path, s3, clock) as node:
        collection = make_collection(node)
        work(node, collection, 3)
        expected = all_rows(node, collection)
        del node
    gc.collect()
    with node_on(tmp_path, s3, clock) as node:
        assert all_rows(node, collection) == expected
        counters = cache_of(node).counters
        assert (counters.misses, counters.damaged) == (0, 0)
        assert counters.hits > 0
        del node
    gc.collect()
    for entry in os.scandir(tmp_path / "cache" / "objects"):
        with open(entry.path, "r+b") as file:
            file.seek(entry.stat().st_size // 2)
            file.write(b"damage")
    with node_on(tmp_path, s3, clock) as node:
        assert all_rows(node, collection) == expected
        assert cache_of(node).counters.damaged > 0
        assert node.open_parts.take_damaged() == {}


def test_a_check_looks_into_the_bucket_and_not_into_the_cache(
    ceph: CephServer, bucket: str, clock: ManualClock, tmp_path: Path
) -> None:
    s3 = config_of(ceph, bucket)
    with node_on(tmp_path, s3, clock) as node:
        collection = make_collection(node)
        work(node, collection, 1)
        expected = all_rows(node, collection)
        assert check_store(node.backups, clock).findings == ()
        (key,) = [key for key in object_keys(node) if key.startswith("parts/")]
        client = ceph.client()
        name = {"Bucket": bucket, "Key": f"one/deployment/{key}"}
        content = bytearray(client.get_object(**name)["Body"].read())
        content[len(content) // 2] ^= 1
        client.put_object(**name, Body=bytes(content))
        found = check_store(node.backups, clock).findings
        assert [finding.place for finding in found] == [key]
        assert all_rows(node, collection) == expected


def test_another_stores_objects_are_refused(
    ceph: CephServer, bucket: str, clock: ManualClock, tmp_path: Path
) -> None:
    s3 = config_of(ceph, bucket)
    with node_on(tmp_path / "one", s3, clock):
        pass
    with (
        pytest.raises(InvalidArgument, match="belongs to store"),
        node_on(tmp_path / "two", s3, clock),
    ):
        pass
    with node_on(tmp_path / "one", s3, clock):  # Nothing was left locked.
        pass


def test_a_cache_is_needed_and_the_bucket_must_be_there(
    ceph: CephServer, clock: ManualClock, tmp_path: Path
) -> None:
    absent = config_of(ceph, "absent-bucket")
    with pytest.raises(InvalidArgument, match="absent-bucket"), node_on(tmp_path, absent, clock):
        pass
    config = NodeConfig(path=str(tmp_path / "catalog"), s3=absent)
    with pytest.raises(InvalidArgument, match="cache_path"):
        Node(config, clock=clock).start(background=False)
    assert S3Store(absent, clock, IdSource()).config.bucket == "absent-bucket"


def test_the_command_serves_from_s3_and_shows_its_cache(
    ceph: CephServer, bucket: str, tmp_path: Path
) -> None:
    served = Served(
        tmp_path / "log",
        *("--path", str(tmp_path / "data"), "--object-store-url", f"s3://{bucket}/a/b"),
        *("--s3-endpoint", ceph.url, "--compactor-workers", "0"),
        environment={
            "OCHREDB_S3_ACCESS_KEY_ID": ceph.access_key,
            "OCHREDB_S3_SECRET_ACCESS_KEY": ceph.secret_key,
        },
    ).ready()
    try:
        made = served.call("POST", "/collections", {"name": "records"})
        ids = [f"id-{number}" for number in range(700)]
        vectors = [[float(number), 1.0] for number in range(700)]
        path = f"/collections/{made['id']}"
        served.call("POST", f"{path}/add", {"ids": ids, "embeddings": vectors})
        until_s = time.monotonic() + 30
        while not served.metric("ochredb_cache_used_bytes") and time.monotonic() < until_s:
            time.sleep(0.1)
        answer = served.call(
            "POST", f"{path}/query", {"query_embeddings": [[333.2, 1.0]], "n_results": 2}
        )
        assert answer["ids"] == [["id-333", "id-334"]]
        assert served.metric("ochredb_cache_hits_total") > 0
        assert served.metric("ochredb_cache_damaged_total") == 0
    finally:
        status = served.stop()
    assert status == 0
    listed = ceph.client().list_objects_v2(Bucket=bucket)["Contents"]
    assert all(item["Key"].startswith("a/b/") for item in listed)
