"""`ochredb repair` of damaged stores, and what must be true if it was killed.

Whatever could be read before can be read still, by whoever opens the store without a repair. The
damaged bytes of what may have been a last copy are there, and each record that is gone is named
below `damaged/`. Run again, it comes to its end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ochredb.checksum import BLOCK_BYTES, xxh3
from ochredb.errors import OchreError
from ochredb.integrity import check, mend
from ochredb.parts import deleted, writer
from ochredb_node import cli_repair
from ochredb_node.node import Node

from .journal import DATABASES, DEFAULT, EVERYTHING, Json, observed
from .stage import BIG, Stage, call_of, collection_id, ids, records, request, start_node

CATALOG = "ochredb.sqlite3"
FLIPPED, LOST, FLIPPED_LOG, LOST_LOG = "flipped", "lost", "flipped-log", "lost-log"
# How many records their parts have; those of the second are three blocks.
ROWS = {FLIPPED: 60, LOST: 600, FLIPPED_LOG: 30, LOST_LOG: 30}
LOGGED = (700, BIG)  # Of a request in the log of the last two: the first one, and how many.
READ_NUMBERS = (*range(0, 600, 25), *LOGGED[:1])  # Of records that are read one by one.
_COLLECTIONS = f"{DATABASES}/{DEFAULT}/collections"
_READABLE, _DAMAGED, _LOST = "could be read", "damaged bytes", "given up"

Change = Callable[[bytearray], None]


def _scale(patch: Callable[..., None]) -> None:
    """No flipped bit is searched for in a whole block, which takes half a minute."""
    patch(mend, "BYTES_MAX", 100_000)


def _records(name: str) -> Json:
    body = records(0, ROWS[name])
    if name != LOST:
        return body
    return {**body, "documents": [text + " x" * 500 for text in body["documents"]]}


def _fill(stage: Stage, store: str, names: tuple[str, ...]) -> dict[str, str]:
    """Collections of parts and tails; the objects that are to be damaged, by what they are."""
    stage.patch(writer, "PACKED_BYTES_MAX", 0)
    stage.patch(deleted, "INLINE_BYTES_MAX", 0)
    found: dict[str, str] = {}
    with stage.node(store) as node:
        for name in names:
            creation = request("create-collection", name)
            stage.do(node, creation, request("add", name, _records(name)), store=store)
            collection = collection_id(node, name)
            node.compactor.fold_now(collection)
            if name == FLIPPED_LOG:
                stage.do(node, request("delete", name, ids(range(3))), store=store)
                node.compactor.fold_now(collection)
            if name in (FLIPPED_LOG, LOST_LOG):
                logged = request("add", name, records(*LOGGED))
                stage.do(node, logged, request("add", name, records(800, 3)), store=store)
            found |= {f"{name} {kind}": key for kind, key in _objects(node, collection)}
    return found


def _objects(node: Node, collection: str) -> Iterator[tuple[str, str]]:
    snapshot = node.logs.snapshot(collection)
    (item,) = node.versions.parts(collection, snapshot.version)
    for info in item.manifest.objects:
        yield info.key.rpartition("/")[2], info.key
    if item.deleted_key is not None:
        yield "deleted", item.deleted_key
    places = node.logs.fragments(collection, snapshot.indexed_offset + 1, snapshot.last_offset, 9)
    for place in places:
        if place.object_key is not None:
            yield "fragment", place.object_key


def _damage(file: Path, change: Change) -> None:
    """By rename: a file that somebody has mapped is not changed."""
    content = bytearray(file.read_bytes())
    change(content)
    new = file.with_name(file.name + ".damaged")
    new.write_bytes(content)
    new.rename(file)


def _flip(place: int) -> Change:
    def change(content: bytearray) -> None:
        content[place] ^= 4

    return change


def _overwrite(place: int) -> Change:
    def change(content: bytearray) -> None:
        content[place : place + 100] = b"\xff" * 100

    return change


def prepare_repair(stage: Stage) -> None:
    """Flipped bits in everything that an object can be, and two that cannot be read any more."""
    keys = _fill(stage, "store", tuple(ROWS))
    changes = {
        f"{FLIPPED} index": _flip(1_000),
        f"{FLIPPED} records": _flip(1_000),
        f"{LOST} records": _overwrite(BLOCK_BYTES + 1_000),
        f"{FLIPPED_LOG} deleted": _flip(5),
        f"{FLIPPED_LOG} fragment": _flip(1_000),
        f"{LOST_LOG} fragment": _overwrite(1_000),
    }
    files = {f"objects/{keys[what]}": change for what, change in changes.items()}
    _prepared(stage, "store", files)


def prepare_repair_catalog(stage: Stage) -> None:
    """A flipped bit in the catalog, and one in the object that says whose the others are."""
    for store in ("store", "store-2"):
        _fill(stage, store, (FLIPPED_LOG, LOST_LOG))
        middle = (stage.tree / store / CATALOG).stat().st_size // 2
        _prepared(stage, store, {CATALOG: _flip(middle), "objects/store_id": _flip(3)})


def _prepared(stage: Stage, store: str, changes: dict[str, Change]) -> None:
    """Damage a store, and note what it is like before and after a repair that is not killed."""
    path, trial = stage.tree / store, stage.tree / "trial"
    shutil.copytree(path, trial)
    right = _state(trial)
    shutil.rmtree(trial)
    for file, change in changes.items():
        _damage(path / file, change)
    for file in changes:
        if not file.endswith("/index"):  # Which is derived: nobody needs what it was.
            stage.journal.done(_fact(store, _DAMAGED, _checksum(path / file)))
    shutil.copytree(path, trial)
    for name in _readable(trial):
        stage.journal.done(_fact(store, _READABLE, name))
    shutil.rmtree(trial)
    shutil.copytree(path, trial)
    _scale(stage.patch)
    repaired(trial)
    state, told = _state(trial), _told(trial)
    shutil.rmtree(trial)
    count, left = (sum(map(len, _ids(one).values())) for one in (right, state))
    assert len(told) == count - left
    for name in told:
        stage.journal.done(_fact(store, _LOST, name))
    stage.journal.given(store, state)


def repair(stage: Stage) -> None:
    _scale(stage.patch)
    for store in sorted(os.listdir(stage.tree)):
        repaired(stage.tree / store)


def repaired(path: Path) -> None:
    """As the command is run."""
    options = {"target": str(path), "accept_loss": True, "json": True}
    with contextlib.redirect_stdout(io.StringIO()):
        cli_repair.run(options)
    assert not check(str(path)).is_damaged


def repair_problems(path: Path, facts: set[str]) -> Iterator[str]:
    """Of a store whose repair was killed; it is repaired."""
    opened = path.with_name(f"{path.name}-opened")
    shutil.copytree(path, opened)
    yield from _missing(path.name, facts, _READABLE, _readable(opened))
    shutil.rmtree(opened)
    yield from _missing(path.name, facts, _DAMAGED, _checksums(path))
    _scale(setattr)
    repaired(path)
    yield from _missing(path.name, facts, _DAMAGED, _checksums(path))
    yield from _missing(path.name, facts, _LOST, _told(path))
    shutil.rmtree(path / "damaged")  # Nobody needs it any more.


def _fact(store: str, what: str, name: str) -> str:
    return f"{store}: {what}: {name}"


def _missing(store: str, facts: set[str], what: str, found: set[str]) -> Iterator[str]:
    noted = {fact for fact in facts if fact.startswith(_fact(store, what, ""))}
    missing = sorted(noted - {_fact(store, what, name) for name in found})
    if missing:
        yield f"{len(missing)} of {len(noted)} are not found any more: {missing[:5]}"


def _state(path: Path) -> Json:
    node = start_node(path)
    try:
        return observed(call_of(node), frozenset())
    finally:
        node.close()


def _ids(state: Json) -> dict[str, list[str]]:
    """By collection."""
    return {name: known["records"]["ids"] for name, known in state["collections"].items()}


def _readable(path: Path) -> set[str]:
    """What whoever opens the store can read, record by record."""
    found = set()
    try:
        node = start_node(path)
    except OchreError:
        return set()
    call = call_of(node)
    try:
        status, known = call("GET", _COLLECTIONS, None, None)
        assert status == 200, known
        for item in known:
            place = f"{_COLLECTIONS}/{item['id']}/get"
            for number in READ_NUMBERS:
                body = {**EVERYTHING, "ids": [f"id-{number}"]}
                status, answer = call("POST", place, body, None)
                if status == 200 and answer["ids"]:
                    found.add(f"{item['name']}/id-{number}")
    finally:
        node.close()
    return found


def _checksum(file: Path) -> str:
    return f"{xxh3(file.read_bytes()):016x}"


def _checksums(path: Path) -> set[str]:
    return {_checksum(file) for file in path.rglob("*") if file.is_file()}


def _told(path: Path) -> set[str]:
    """Which records are gone, as files below `damaged/` say."""
    documents = [json.loads(file.read_bytes()) for file in path.glob("damaged/*/*.json")]
    items: list[dict[str, Any]] = []
    for document in documents:
        items += document.get("repaired", [document])
    return {
        f"{item['collection']}: {lost['id']} at {lost['offset']}"
        for item in items
        for lost in item.get("lost", ())
    }
