"""After a purge, what was deleted or replaced is in no file: every byte of the store is looked at.

The same scan finds what lives, and finds what was deleted before the purge, so it can find things.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ochredb.errors import Corrupt, Exhausted
from ochredb.testing.scan import files_with
from ochredb.types import Float32s, Op
from ochredb.vacuum import VacuumReport
from ochredb_compactor.vacuum import Vacuum
from ochredb_node import cli
from ochredb_node.node import Node

from .kernel import ROOT, append, ids_of, make_collection, operations, running_node

DIMENSION = 32
GRAPH_ROWS, GRAPH_DIMENSION = 5_200, 128


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Grace periods that a test can wait for; small requests inline, large ones as objects."""
    with running_node(str(tmp_path / "store"), grace_s=0.2, inline_bytes_max=4_000) as node:
        yield node


def _purge(node: Node) -> None:
    report = Vacuum(
        node.vacuums._around, purge=True, progress=lambda *_: None, step=lambda: None
    ).run()
    assert report.is_complete, report


def _vectors(count: int, seed: int, dimension: int = DIMENSION) -> Float32s:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def _put(
    node: Node, collection: str, names: Sequence[str], seed: int, *, op: Op = Op.UPSERT
) -> dict[str, bytes]:
    """Records of which each field can be recognised; returns what to look for, of the first."""
    vectors = _vectors(len(names), seed)
    append(
        node,
        collection,
        operations(
            op,
            names,
            vectors,
            documents=[f"document {seed} of {name}: sphinx of quartz" for name in names],
            uris=[f"file://{seed}/{name}" for name in names],
            metadatas=[{f"key-{seed}-{name}": f"value {seed} {name}"} for name in names],
        ),
    )
    first = names[0]
    return {
        "document": f"document {seed} of {first}: sphinx".encode(),
        "uri": f"file://{seed}/{first}".encode(),
        "key": f"key-{seed}-{first}".encode(),
        "value": f"value {seed} {first}".encode(),
        "vector": vectors[0].tobytes(),
    }


def _found(node: Node, needles: dict[str, bytes]) -> set[str]:
    assert node.config.path is not None
    found = files_with(Path(node.config.path), needles)
    return {name for name, files in found.items() if files}


def _named(prefix: str, needles: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{prefix} {name}": content for name, content in needles.items()}


def test_nothing_that_was_deleted_or_replaced_is_left(node: Node) -> None:
    collection = make_collection(node)
    dropped = make_collection(node, "name-of-the-dropped-one")
    gone: dict[str, bytes] = {"collection": b"name-of-the-dropped-one", "error": b"error about"}
    live: dict[str, bytes] = {}
    for size, kind in ((3, "inline"), (80, "object")):
        names = [f"{kind}-deleted-{number}" for number in range(size)]
        gone |= _named(f"{kind} deleted", _put(node, collection, names, 1))
        gone[f"{kind} deleted id"] = names[0].encode()
        names = [f"{kind}-replaced-{number}" for number in range(size)]
        gone |= _named(f"{kind} replaced", _put(node, collection, names, 2))
        names = [f"{kind}-kept-{number}" for number in range(size)]
        live |= _named(f"{kind} kept", _put(node, collection, names, 3))
        live[f"{kind} kept id"] = names[0].encode()
        names = [f"{kind}-dropped-{number}" for number in range(size)]
        gone |= _named(f"{kind} dropped", _put(node, dropped, names, 4))
        gone[f"{kind} dropped id"] = names[0].encode()
        if kind == "inline":
            node.compactor.fold_now(collection)
            node.compactor.fold_now(dropped)
    for size, kind in ((3, "inline"), (80, "object")):
        removed: dict[str, None] = {f"key-2-{kind}-replaced-{n}": None for n in range(size)}
        names = [f"{kind}-replaced-{number}" for number in range(size)]
        live |= _named(f"{kind} replacement", _put(node, collection, names, 5))
        nulls = operations(Op.UPDATE, names, metadatas=[removed] * size)
        append(node, collection, nulls)
        ids = [f"{kind}-deleted-{number}" for number in range(size)]
        append(node, collection, operations(Op.DELETE, ids))
    lease = node.world.jobs.acquire(collection, "compact", "host/1/a", 60.0)
    assert lease is not None
    node.world.jobs.end(lease, "an error about inline-deleted-0")
    node.namespace.delete_collection(
        "default_tenant", "default_database", "name-of-the-dropped-one"
    )
    left_behind = Path(str(node.config.path), "objects", "tmp", "of-a-dead-writer")
    left_behind.write_bytes(gone["object deleted document"])
    os.utime(left_behind, (1, 1))
    assert _found(node, gone) == set(gone), "deleting alone erases nothing"
    _purge(node)
    assert _found(node, gone) == set()
    assert _found(node, live) == set(live)
    assert len(ids_of(node, collection)) == 2 * 83
    node.sqlite.checkpoint()
    assert _found(node, gone) == set()


def test_graphs_and_large_parts_are_written_without_the_dead(node: Node) -> None:
    collection = make_collection(node)
    vectors = _vectors(2 * GRAPH_ROWS, 7, GRAPH_DIMENSION)
    for start in (0, GRAPH_ROWS):
        names = [f"row-{number:05d}" for number in range(start, start + GRAPH_ROWS)]
        append(node, collection, operations(Op.ADD, names, vectors[start : start + GRAPH_ROWS]))
        node.compactor.compact_now(collection)
        append(node, collection, operations(Op.DELETE, [f"row-{start + 5:05d}"]))
    (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    assert part.manifest.graph_labels == 2 * GRAPH_ROWS, "it has grown: row 5 is dead in its graph"
    gone = {"early": vectors[5].tobytes(), "late": vectors[GRAPH_ROWS + 5].tobytes()}
    gone["id"] = b"row-00005"
    live = {"vector": vectors[6].tobytes(), "id": b"row-00006"}
    assert _found(node, gone) == set(gone)
    _purge(node)
    assert _found(node, gone) == set()
    assert _found(node, live) == set(live)
    (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
    assert part.manifest.has_graph and part.manifest.rows == 2 * GRAPH_ROWS - 2


def test_other_processes_go_on_reading_and_writing_meanwhile(node: Node) -> None:
    collection = make_collection(node)
    gone = _put(node, collection, [f"deleted-{number}" for number in range(40)], 1)
    _put(node, collection, ["kept"], 2)
    program = (
        "import sys, ochredb\n"
        "client = ochredb.PersistentClient(sys.argv[1])\n"
        "records = client.get_collection('records', embedding_function=None)\n"
        "number = 0\n"
        "while True:\n"
        "    found = records.get(ids=['kept'], include=['embeddings'])\n"
        "    assert found['ids'] == ['kept'], found\n"
        f"    records.add(ids=[f'new-{{number}}'], embeddings=[[1.0] * {DIMENSION}])\n"
        "    assert records.get(ids=[f'new-{number}'])['ids']\n"
        "    number += 1\n"
        "    print(number, flush=True)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(node.config.path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n", other.stderr
        append(
            node, collection, operations(Op.DELETE, [f"deleted-{number}" for number in range(40)])
        )
        for _ in range(5):
            report = Vacuum(
                node.vacuums._around, purge=True, progress=lambda *_: None, step=lambda: None
            ).run()
            # Names of keys need a moment without a write.
            assert all("metadata keys" in text for text in report.problems), report
            if report.is_complete:
                break
        else:
            pytest.fail("no purge found such a moment")
        assert _found(node, gone) == set()
        before = int(other.stdout.readline())
        assert int(other.stdout.readline()) == before + 1
        assert other.poll() is None
    finally:
        other.terminate()
        errors = other.communicate(timeout=30)[1]
    assert "Error" not in errors
    assert "kept" in ids_of(node, collection)


def test_parts_replaced_faster_than_they_are_written_are_told(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(node)
    _put(node, collection, ["a", "b"], 1)
    monkeypatch.setattr(node.compactor._work, "rewrite", lambda *_: True)
    with pytest.raises(Exhausted, match="faster"):
        node.compactor.rewrite_now(collection, 0.0, lambda: None)


def _purged(path: str, *, deleted: Sequence[str] = ()) -> VacuumReport:
    """What a purge says in a process of its own life, after these records were deleted."""
    with running_node(path, grace_s=0.2) as node:
        if deleted:
            (collection,) = node.namespace.all_ids()
            append(node, collection, operations(Op.DELETE, deleted))
        return Vacuum(
            node.vacuums._around, purge=True, progress=lambda *_: None, step=lambda: None
        ).run()


def test_what_a_repair_has_kept_is_told_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damaged file is the last copy of what it holds: somebody must say that it may go."""
    path = str(tmp_path / "store")
    with running_node(path) as node:
        collection = make_collection(node)
        gone = _put(node, collection, ["deleted"], 1)
        _put(node, collection, ["kept"], 2)
        node.compactor.compact_now(collection)
        (part,) = node.versions.parts(collection, node.logs.snapshot(collection).version)
        (info,) = part.manifest.objects
    file = Path(path, "objects", info.key)
    content = bytearray(file.read_bytes())
    content[content.index(b"file://2/kept")] ^= 1
    file.with_name("new").write_bytes(content)
    file.with_name("new").rename(file)
    assert cli.main(["repair", path]) == 0
    report = _purged(path, deleted=["deleted"])
    assert not report.is_complete and not report.problems
    (folder,) = Path(path, "damaged").iterdir()
    (told,) = report.kept
    assert told.startswith(f"damaged/{folder.name} was put aside") and "delete it" in told
    found = files_with(Path(path), gone)
    kept = os.path.relpath(folder / "objects" / info.key, path)
    assert found == {name: [kept] for name in gone}, "there, and nowhere else"
    capsys.readouterr()
    assert cli.main(["vacuum", "--purge", path]) == 1
    printed = capsys.readouterr()
    assert f"still kept: damaged/{folder.name}" in printed.err
    assert "nothing that was deleted" not in printed.out
    shutil.rmtree(folder)
    assert cli.main(["vacuum", "--purge", path]) == 0
    assert "nothing that was deleted before is in any file" in capsys.readouterr().out
    assert files_with(Path(path), gone) == {name: [] for name in gone}


def test_a_write_ahead_log_that_was_put_aside_is_told_and_left(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    program = (
        "import os, sys\n"
        "from tests.unit.kernel import *\n"
        "from tests.unit.test_purge import _put\n"
        "with running_node(sys.argv[1]) as node:\n"
        "    collection = make_collection(node)\n"
        "    node.database.checkpoint()\n"
        "    _put(node, collection, ['deleted'], 1)\n"
        "    _put(node, collection, ['lost'], 2)\n"
        "    os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, check=True)
    log = Path(path, "ochredb.sqlite3-wal")
    content = bytearray(log.read_bytes())
    content[content.rindex(b"document 2 of lost")] ^= 1
    log.write_bytes(content)
    with pytest.raises(Corrupt, match="has lost writes"), running_node(path):
        pass
    os.unlink(os.path.join(path, "write.lock"))  # As the message says.
    gone = {"document": b"document 1 of deleted: sphinx", "uri": b"file://1/deleted"}
    report = _purged(path, deleted=["deleted"])
    assert not report.is_complete and not report.problems
    (told,) = report.kept
    assert told.startswith("ochredb.sqlite3-wal.lost was put aside") and "delete it" in told
    assert files_with(Path(path), gone) == {name: [f"{log.name}.lost"] for name in gone}
    os.unlink(f"{log}.lost")
    assert _purged(path).is_complete
    assert files_with(Path(path), gone) == {name: [] for name in gone}
