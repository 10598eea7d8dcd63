"""What the scenarios do, role by role: each durable step twice, without threads of their own."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

from ochredb.backup import backup, restore
from ochredb.catalog import database as catalog_database
from ochredb.catalog.appends import AppendRequest
from ochredb.catalog.pins import PinTable
from ochredb.catalog.quarantine import QuarantineTable
from ochredb.checksum import signed, xxh3
from ochredb.clock import SystemClock
from ochredb.ids import IdSource
from ochredb.parts import deleted, writer
from ochredb.types import Appended
from ochredb_compactor import compaction, garbage, scheduler
from ochredb_compactor.service import CompactorService
from ochredb_compactor.vacuum import Vacuum
from ochredb_frontend import service as frontend_service
from ochredb_node.node import Node
from tests.golden.seals import seal_of_blocks

from .journal import DEFAULT, observed
from .stage import BIG, LaterClock, Stage, call_of, collection_id, ids, records, request, start_node

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "v1"
DAY_S = 86_400.0
_OTHER_TTL_S = 5.0  # Of a lease for whose end somebody waits after a crash.


class EarlierClock(SystemClock):
    """An hour ago."""

    def now_us(self) -> int:
        return super().now_us() - 3_600_000_000


# -- node


def create(stage: Stage) -> None:
    for store in ("store", "store-2"):
        with stage.node(store):
            pass


def prepare_migrate(stage: Stage) -> None:
    """Two stores as the first format version had them, and what they hold."""
    for store in ("store", "store-2", "migrated"):
        path = stage.tree / store
        shutil.copytree(GOLDEN / "objects", path / "objects")
        connection = sqlite3.connect(path / "ochredb.sqlite3")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript((GOLDEN / "catalog-dump.txt").read_text(encoding="utf-8"))
        connection.close()
    node = start_node(stage.tree / "migrated")
    state = observed(call_of(node), frozenset())
    node.close()
    assert state["collections"][f"{DEFAULT}/golden"]["records"]["ids"]
    shutil.rmtree(stage.tree / "migrated")
    for store in ("store", "store-2"):
        stage.journal.given(store, state)
        catalog = stage.tree / store / "ochredb.sqlite3"
        (stage.tree / store / "ochredb.seal").write_bytes(seal_of_blocks(catalog.read_bytes()))


def migrate(stage: Stage) -> None:
    for store in ("store", "store-2"):
        start_node(stage.tree / store).close()


def prepare_catalog(stage: Stage) -> None:
    """Free pages in the catalog's file; and what dead starts left beside it."""
    with stage.node() as node:
        stage.do(node, request("create-collection", "kept"), request("add", "kept", records(0, 5)))
        for number in range(20):
            stage.do(node, request("create-collection", f"some-{number}"))
            stage.do(node, request("add", f"some-{number}", records(0, 8)))
        for number in range(20):
            stage.do(node, request("drop-collection", f"some-{number}"))
    for _ in range(2):
        name = f".ochredb-probe-{IdSource(EarlierClock()).uuid7()}"
        (stage.tree / "store" / name).write_bytes(b"left")


def catalog(stage: Stage) -> None:
    """Pages are freed, and the write-ahead log is copied, restarted and cut off."""
    stage.patch(catalog_database, "_VACUUM_PAGES", 1)
    stage.patch(catalog_database, "_WAL_IDLE_BYTES_MAX", 0)
    with stage.node() as node:
        database = node.sqlite
        for _ in range(2):
            database.release_free_pages(1)
            database.checkpoint(restart_above_bytes=0)
            database.release_free_pages(1)
            database.checkpoint()
            assert database.checkpoint()
        database.release_free_pages(1)  # For the close.


# -- log


def prepare_write(stage: Stage) -> None:
    with stage.node() as node:
        stage.do(node, request("create-collection", "alpha"), request("create-collection", "beta"))
        stage.do(
            node, request("add", "alpha", records(0, 12)), request("add", "beta", records(0, BIG))
        )


def write(stage: Stage) -> None:
    with stage.node() as node:
        stage.do(
            node,
            request("add", "alpha", records(20, 3)),
            request("upsert", "alpha", records(1, BIG, 1)),
            request("upsert", "beta", records(1, BIG, 1)),
            request("update", "alpha", records(2, 2, 2)),
            request("delete", "alpha", ids([3, 4])),
            request("delete", "beta", {"where": {"number": {"$lt": 3}}}),
        )
        # Nothing matches: the key is bound to the request.
        gone = {"where": {"number": 1_000}}
        stage.do(node, request("delete", "alpha", gone))
        stage.do(node, request("delete", "beta", gone))
        # As if others had got in between each time.
        stage.patch(frontend_service, "_CONDITIONAL_ROUNDS", 0)
        stage.do(
            node,
            request("delete", "alpha", {"where": {"version": 1}}),
            request("delete", "beta", {"where": {"number": {"$gt": 30}}}),
        )


# -- names


def prepare_names(stage: Stage) -> None:
    """Collections with parts, fragments and objects, in three databases."""
    with stage.node() as node:
        for database in ("one", "two", DEFAULT):
            if database != DEFAULT:
                stage.do(node, request("create-database", database))
            for name in ("alpha", "beta"):
                stage.do(node, request("create-collection", name, database=database))
                stage.do(node, request("add", name, records(0, BIG), database=database))
                info = node.namespace.get_collection("default_tenant", database, name)
                node.compactor.fold_now(info.id)
                stage.do(node, request("upsert", name, records(5, BIG, 1), database=database))


def names(stage: Stage) -> None:
    with stage.node() as node:
        for number in (1, 2):
            stage.do(
                node,
                request("create-tenant", f"tenant-{number}"),
                request("update-tenant", f"tenant-{number}", resource=f"resource-{number}"),
                request("create-database", f"new-{number}"),
                request(
                    "create-collection",
                    "gamma",
                    database=f"new-{number}",
                    metadata={"number": number},
                ),
            )
        for name in ("alpha", "beta"):
            renamed, metadata = f"renamed-{name}", {"of": name}
            stage.do(
                node,
                request(
                    "change-collection", name, database="one", new_name=renamed, metadata=metadata
                ),
                request("drop-collection", name),
            )
        stage.do(node, request("drop-database", "two"), request("drop-database", "new-1"))
        stage.do(node, request("reset", ""))
        stage.do(node, request("create-collection", "after"), request("reset", ""))


# -- compactor


def prepare_compact(stage: Stage) -> None:
    """Two collections with a part, and a tail of inline and object fragments over it."""
    with stage.node() as node:
        for name in ("alpha", "beta"):
            stage.do(node, request("create-collection", name), request("add", name, records(0, 60)))
            node.compactor.fold_now(collection_id(node, name))
            stage.do(
                node,
                request("upsert", name, records(50, BIG, 1)),
                request("update", name, records(10, 2, 2)),
                request("delete", name, ids(range(5))),
                request("delete", name, {"where": {"number": {"$gt": 80}}}),
            )


def compact(stage: Stage) -> None:
    stage.patch(deleted, "INLINE_BYTES_MAX", 0)
    with stage.node() as node:
        for name in ("alpha", "beta"):
            node.compactor.fold_now(collection_id(node, name))


def compact_and_lose(stage: Stage) -> None:
    """Before each commit another process takes the lease over, and gives it back."""
    world = _world
    with stage.node() as node:
        jobs, prepare = world(node).jobs, node.query.prepare
        lost: set[str] = set()

        def take_over(collection: str, manifest: Any) -> None:
            prepare(collection, manifest)
            if collection not in lost:
                lost.add(collection)
                lease = jobs.acquire(
                    collection, "compact", "other", _OTHER_TTL_S, lambda _owner: True
                )
                assert lease is not None
                assert jobs.renew(lease, _OTHER_TTL_S)
                jobs.end(lease)

        object.__setattr__(world(node), "before_commit", take_over)
        for name in ("alpha", "beta"):
            node.compactor.fold_now(collection_id(node, name))
        assert len(lost) == 2


def _world(node: Node) -> Any:
    return node.compactor._world


def _small_graphs(stage: Stage) -> None:
    stage.patch(scheduler, "GRAPH_ROWS_MIN", 40)
    stage.patch(scheduler, "GRAPH_COMPONENTS_MIN", 160)
    stage.patch(writer, "TEXT_INDEX_ROWS_MIN", 40)


def prepare_merge(stage: Stage) -> None:
    """Two collections of a part with a graph, and one without that is to join it."""
    _small_graphs(stage)
    with stage.node() as node:
        for name in ("alpha", "beta"):
            stage.do(node, request("create-collection", name), request("add", name, records(0, 60)))
            collection = collection_id(node, name)
            node.compactor.compact_now(collection)
            stage.do(node, request("upsert", name, records(50, 45, 1)))
            stage.do(node, request("delete", name, ids(range(3))))
            node.compactor.fold_now(collection)


def prepare_quarantine(stage: Stage) -> None:
    """Two collections with a request in their tails that is no fragment."""
    prepare_compact(stage)
    data = b"this is no fragment"
    with stage.node() as node:
        for name in ("alpha", "beta"):
            poison = AppendRequest(
                collection=collection_id(node, name),
                request_id=node.ids.uuid7(),
                request_hash=None,
                count=2,
                dimension=None,
                key_types=frozenset(),
                expect_last_offset=None,
                payload=data,
                object_key=None,
                byte_start=None,
                byte_stop=None,
                object_bytes=0,
                byte_count=len(data),
                checksum=signed(xxh3(data)),
            )
            assert isinstance(node.logs.append([poison])[0], Appended)
        stage.journal.given("store", observed(call_of(node), frozenset()))


def quarantine(stage: Stage) -> None:
    """It is put into quarantine by compaction, its bytes as an object; and dropped."""
    stage.patch(compaction, "_QUARANTINE_INLINE_BYTES_MAX", 0)
    with stage.node() as node:
        table = QuarantineTable(node.database, node.clock)
        for name in ("alpha", "beta"):
            node.compactor.fold_now(collection_id(node, name))
        items = table.list()
        assert len(items) == 2
        for item in items:
            table.drop(item.collection, item.start)


def merge(stage: Stage) -> None:
    _small_graphs(stage)
    with stage.node() as node:
        for name in ("alpha", "beta"):
            node.compactor.compact_now(collection_id(node, name))


def prepare_collect(stage: Stage) -> None:
    """Every kind of garbage, several of each; see `collect`."""
    with stage.node() as node:
        for name in ("kept-1", "kept-2", "dropped-1", "dropped-2"):
            stage.do(
                node, request("create-collection", name), request("add", name, records(0, BIG))
            )
            collection = collection_id(node, name)
            node.compactor.fold_now(collection)
            stage.do(node, request("upsert", name, records(5, BIG, 1)))
            node.compactor.fold_now(collection)
        stage.do(
            node, request("drop-collection", "dropped-1"), request("drop-collection", "dropped-2")
        )
        ids_of_orphans = IdSource()
        for number in range(4):  # Of crashed uploads.
            node.store.create(f"parts/{ids_of_orphans.uuid7()}/packed", b"orphan %d" % number)
        folder = stage.tree / "store" / "objects" / "tmp"
        for number in range(2):  # Of dead writers.
            (folder / f"left-{number}").write_bytes(b"left")
        pins = PinTable(node.database, node.clock)
        for number, ttl_s in enumerate((120.0, 7 * DAY_S)):  # Of dead backups.
            with pins.take(ids_of_orphans.uuid7(), f"dead/{number}", ttl_s):
                pass


def collect(stage: Stage) -> None:
    """Pins and keys expire, versions let go, objects and orphans are deleted, rows forgotten."""
    stage.patch(garbage, "_BATCH", 2)
    stage.patch(garbage, "_COLLECTIONS_PER_COMMIT", 1)
    clock = LaterClock()
    with stage.node(clock=clock) as node:
        for _ in range(3):
            clock.advance(5 * DAY_S)
            node._housekeep()
            node.compactor.collect_now(sweep_orphans=True)


class WaitingClock(LaterClock):
    """Time passes for whoever waits."""

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)


def prepare_vacuum(stage: Stage) -> None:
    """Two collections with dead rows in a part, and with metadata keys that no record has."""
    with stage.node() as node:
        for name in ("alpha", "beta"):
            stage.do(node, request("create-collection", name), request("add", name, records(0, 60)))
            node.compactor.fold_now(collection_id(node, name))
            body = records(80, 2)
            for number, metadata in enumerate(body["metadatas"]):
                metadata[f"gone-{number}"] = number
            stage.do(node, request("add", name, body), request("delete", name, ids(range(75, 90))))
            stage.do(node, request("upsert", name, records(0, BIG, 1)))


def vacuum(stage: Stage) -> None:
    """A purge, twice: the second one finds hardly anything to do."""
    with stage.node(clock=WaitingClock()) as node:
        for _ in range(2):
            around = node.vacuums._around
            report = Vacuum(around, purge=True, progress=lambda *_: None, step=lambda: None).run()
            assert report.is_complete, report


def prepare_clock_set_back(stage: Stage) -> None:
    """Garbage with stamps of the day after tomorrow."""
    clock = LaterClock()
    clock.advance(2 * DAY_S)
    with stage.node(clock=clock) as node:
        for name in ("alpha", "beta"):
            stage.do(node, request("create-collection", name))
            stage.do(node, request("add", name, records(0, BIG)))
            node.compactor.fold_now(collection_id(node, name))
        stage.do(node, request("drop-collection", "alpha"))


def clock_set_back(stage: Stage) -> None:
    """Twice the clock is found to have been set back, by two days and by one."""
    clock = LaterClock()
    with stage.node(clock=clock) as node:
        node.compactor.collect_now(sweep_orphans=False)  # From now on it is watched.
        for _ in range(2):
            clock.advance(100)
            node.compactor.collect_now(sweep_orphans=False)
            if node.namespace.count_collections("default_tenant", DEFAULT) == 1:
                stage.do(node, request("drop-collection", "beta"))
                clock.set_back(DAY_S)
                node.compactor.collect_now(sweep_orphans=False)


def reserve(stage: Stage) -> None:
    """A full disk comes and goes."""
    with stage.node() as node:
        for _ in range(2):
            node.reserve.take_back()
            node.reserve.give_up()


# -- damage


def prepare_mend(stage: Stage) -> None:
    """A tail of requests that lie in the catalog."""
    with stage.node() as node:
        stage.do(node, request("create-collection", "alpha"))
        for first in (0, 3, 6):
            stage.do(node, request("add", "alpha", records(first, 3)))


def mend(stage: Stage) -> None:
    """Opened, written to and closed again and again; as a repair puts requests back."""
    for _ in range(3):
        with stage.node() as node:
            alpha = collection_id(node, "alpha")
            (place, *_) = node.logs.fragments(alpha, 1, 9, 9)
            assert place.payload is not None
            node.logs.replace_fragment(alpha, place, place.payload, place.checksum)


# -- backup


def prepare_backup(stage: Stage) -> None:
    """Parts, dead rows, and a tail of inline and object fragments."""
    prepare_compact(stage)
    with stage.node() as node:
        collection = collection_id(node, "alpha")
        stage.patch(deleted, "INLINE_BYTES_MAX", 0)
        node.compactor.fold_now(collection)


def take_backup(stage: Stage) -> None:
    stage.journal.opened("store")
    for number in (1, 2):
        backup(str(stage.tree / "store"), str(stage.tree / f"backup-{number}"))
        stage.journal.done(f"backup-{number}")


def prepare_restore(stage: Stage) -> None:
    prepare_backup(stage)
    with stage.node() as node:  # So that the restored stores have no tail to fold when they close.
        for name in ("alpha", "beta"):
            node.compactor.fold_now(collection_id(node, name))
    backup(str(stage.tree / "store"), str(stage.tree / "backup-1"))
    stage.journal.done("backup-1")


def restore_backup(stage: Stage) -> None:
    stage.patch(CompactorService, "start", lambda _self: None)  # It opens what it restored.
    for number in (1, 2):
        restore(str(stage.tree / "backup-1"), str(stage.tree / f"restored-{number}"))
        stage.journal.done(f"restored-{number}")
