"""The fresh process: opens what a killed one left, in each tree, and checks I1 to I8.

python -m tests.crash.points.aftermath reads one JSON list [SCENARIO, JOURNAL, TREE...] a line, and
answers each by a line: what is wrong, as a JSON list of texts. Each is checked by a child of its
own, forked from this process, which has imported everything and never opened a store.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  So that the children need not.

from ochredb.backup import backup, check, restore
from ochredb.backup.archive import read_manifest
from ochredb.catalog.sqlite import SqliteDatabase
from ochredb.errors import InvalidArgument
from ochredb.parts.manifest import Manifest
from ochredb.testing.model import canonical
from ochredb_node.node import Node
from tests.unit.kernel import sql

from .acts import DAY_S
from .journal import DATABASES, Call, Expected, Json, expected, observed, perform
from .repairs import repair_problems
from .scenarios import SCENARIOS
from .stage import DIMENSION, LaterClock, call_of, records, request, start_node

CATALOG = "ochredb.sqlite3"
# What a store's folder has when nothing is left behind.
TOP = {CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm", "ochredb.txt", "objects"}
TOP |= {"lock", "open.lock", "write.lock", "checkpoint.lock", "reserve"}
TOP |= {"ochredb.seal", "ochredb.seal.new"}


def check_store(path: Path, want: Expected, later_s: float) -> Iterator[str]:
    """Problems of one store; it is used meanwhile, and its garbage is collected."""
    clock = LaterClock()
    clock.advance(later_s)
    node = start_node(path, clock)
    call = call_of(node)
    try:
        yield from catalog_problems(node)
        found = observed(call, want.tenants)
        yield from differences("I1, I3, I4", found, want.states)
        for unanswered in [want.unanswered] if want.unanswered else []:
            status, answer = perform(call, unanswered, again=True)
            if status not in (200, 201):
                yield f"I8: the repeat of {unanswered['op']} was answered {status}: {answer}"
        found = observed(call, want.tenants)
        yield from differences("I8, after the repeat", found, want.states[-1:])
        if want.last_with_key is not None and later_s == 0 and _is_there(found, want.last_with_key):
            status, answer = perform(call, want.last_with_key)
            if status not in (200, 201):
                yield f"I8: a repeat with its key was answered {status}: {answer}"
            again = observed(call, want.tenants)
            yield from differences("I8, after a repeat with its key", again, [found])
        yield from compaction_problems(node, call, want, found)
        yield from catalog_problems(node)
        yield from garbage_problems(node, clock, path)
        yield from differences("I6, after collecting", observed(call, want.tenants), [found])
        use(call)
        found = observed(call, want.tenants)
    finally:
        node.close()
    node = start_node(path, clock)
    try:
        again = observed(call_of(node), want.tenants)
        yield from differences("I1, opened again", again, [found])
        yield from leftovers(path)
    finally:
        node.close()


def _is_there(found: Json, asked: Json) -> bool:
    return f"{asked.get('database', 'default_database')}/{asked['name']}" in found["collections"]


def differences(what: str, found: Json, allowed: list[Json]) -> Iterator[str]:
    """Nothing if the state is one of those; else where it differs from the last of them."""
    if canonical(found) in map(canonical, allowed):
        return
    known, shown = allowed[-1], []
    for part in ("tenants", "databases"):
        if found[part] != known[part]:
            shown.append(f"{part} are {found[part]} instead of {known[part]}")
    for name in sorted({*found["collections"], *known["collections"]}):
        one, other = (state["collections"].get(name) for state in (found, known))
        if one is None or other is None:
            shown.append(f"{name} is {'missing' if one is None else 'there'}")
        elif canonical(one) != canonical(other):
            sizes = [len(item["records"]["ids"]) for item in (one, other)]
            counts = [item["operations"] for item in (one, other)]
            shown.append(f"{name}: records {sizes}, operations {counts}, or their content")
    yield f"{what}: not one of {len(allowed)} possible states: {'; '.join(shown)}"


def rows(node: Node, text: str) -> list[tuple[Any, ...]]:
    with node.database.read() as session:
        return session.all(sql(text))


def catalog_problems(node: Node) -> Iterator[str]:
    """I2, I6 and I7 as the catalog's rows and the store's objects tell."""
    if isinstance(node.database, SqliteDatabase):
        found = rows(node, "PRAGMA integrity_check")
        if found != [("ok",)]:
            yield f"the catalog is damaged: {found}"
    logs = rows(node, "SELECT collection, floor_offset, next_offset, version FROM logs")
    for collection, floor, following, version in logs:
        ranges = rows(
            node, f"SELECT start, stop FROM fragments WHERE collection = '{collection}' ORDER BY 1"
        )
        position = floor + 1
        for start, stop in ranges:
            if start != position or stop < start:
                yield f"I2: a fragment is [{start}, {stop}] where {position} is due: {ranges}"
            position = stop + 1
        if position != following:
            yield f"I2: the log ends before {position}, its row says {following}"
        history = rows(
            node,
            "SELECT version, indexed_offset FROM versions"
            f" WHERE collection = '{collection}' ORDER BY 1",
        )
        if [version] != [number for number, _ in history][-1:] and version != 0:
            yield f"I7: version {version} is current, the history is {history}"
        if [offset for _, offset in history] != sorted(offset for _, offset in history):
            yield f"I7: the indexed offset goes back: {history}"
    stored = {item.key: item.size for item in node.store.list("")}
    objects = rows(node, "SELECT key, size, state FROM objects")
    known = {key: (size, state) for key, size, state in objects}
    held = set(rows(node, "SELECT key, kind, collection, number FROM object_references"))
    for key in {key for key, *_ in held}:
        if known.get(key) != (stored.get(key), "live"):
            yield f"I6: {key} is referred to, and is {known.get(key)}, stored {stored.get(key)}"
    for text, collection, version in rows(
        node,
        "SELECT manifest, version_parts.collection, version FROM version_parts"
        " LEFT JOIN parts ON parts.id = version_parts.part",
    ):
        if text is None:
            yield f"I6: version {version} names a part that is not known"
            continue
        for item in Manifest.from_json(text).objects:
            if (item.key, "version", collection, version) not in held:
                yield f"I6: version {version} does not keep {item.key}"


def compaction_problems(node: Node, call: Call, want: Expected, found: Json) -> Iterator[str]:
    """I5: answers before and after everything is folded and merged."""
    before = nearest(call, found)
    for (collection,) in rows(node, "SELECT collection FROM logs"):
        node.compactor.compact_now(collection)
    yield from differences("I5", observed(call, want.tenants), [found])
    if canonical(nearest(call, found)) != canonical(before):
        yield "I5: searches are answered differently after compaction"


def nearest(call: Call, state: Json) -> Json:
    """Every record of every collection by distance, exactly; and how many a plain search gives."""
    answers = {}
    for place, collection in state["collections"].items():
        count = len(collection["records"]["ids"])
        if count == 0:
            continue
        database, name = place.split("/")
        status, info = call("GET", f"{DATABASES}/{database}/collections/{name}", None, None)
        assert status == 200, (place, status, info)
        dimension = len(collection["records"]["embeddings"][0])
        vectors = [[1.0] * dimension, [50.0] * dimension]
        body: Json = {"query_embeddings": vectors, "n_results": count, "include": ["distances"]}
        path = f"{DATABASES}/{database}/collections/{info['id']}/query"
        status, exact = call("POST", path, {**body, "exact": True}, None)
        assert status == 200, (place, status, exact)
        status, plain = call("POST", path, body, None)
        assert status == 200, (place, status, plain)
        answers[place] = [exact["ids"], exact["distances"], [len(one) for one in plain["ids"]]]
        assert answers[place][2] == [count, count], f"I10: {place} has {count}: {answers[place][2]}"
    return answers


def garbage_problems(node: Node, clock: LaterClock, path: Path) -> Iterator[str]:
    """I6: when everything has had its time, nothing is left but what is referred to."""
    for _ in range(3):
        clock.advance(10 * DAY_S)
        node._housekeep()
        node.compactor.collect_now(sweep_orphans=True)
    held = {key for (key,) in rows(node, "SELECT DISTINCT key FROM object_references")}
    stored = {item.key for item in node.store.list("")}
    if stored != held | {"store_id"}:
        yield f"I6: stored and kept differ: {sorted(stored ^ held ^ {'store_id'})}"
    known = {key for (key,) in rows(node, "SELECT key FROM objects")}
    if known != held:
        yield f"I6: rows of objects that nothing refers to: {sorted(known ^ held)}"
    if pins := rows(node, "SELECT id FROM pins"):
        yield f"I6: pins are left: {pins}"


def leftovers(path: Path) -> Iterator[str]:
    if more := set(os.listdir(path)) - TOP:
        yield f"I6: left in the store's folder: {sorted(more)}"
    objects = path / "objects"
    if left := os.listdir(objects / "tmp") if (objects / "tmp").exists() else []:
        yield f"I6: temporary files are left: {left}"
    for folder, folders, names in os.walk(objects):
        if Path(folder).parent.parent == objects and not folders and not names:
            yield f"I6: an empty folder is left: {folder}"


def use(call: Call) -> None:
    """The store takes new writes."""
    perform(call, request("create-collection", "afterwards"))
    status, answer = perform(call, request("add", "afterwards", records(0, 3)))
    assert status == 201, answer
    status, answer = perform(call, request("get", "afterwards", {"include": ["embeddings"]}))
    assert len(answer["embeddings"][0]) == DIMENSION, (status, answer)


# -- backups


def backup_problems(tree: Path, facts: set[str], state: Json) -> Iterator[str]:
    """Of folders `backup-N`: a backup says that it is incomplete, or is complete."""
    for number in (1, 2):
        path = tree / f"backup-{number}"
        try:
            read_manifest(str(path))
        except InvalidArgument as error:
            if path.name in facts:
                yield f"{path.name} was completed, and is refused: {error}"
        else:
            check(str(path))
            restore(str(path), str(tree / f"again-{number}"))
            yield from state_problems(tree / f"again-{number}", state)


def restored_problems(tree: Path, facts: set[str], state: Json) -> Iterator[str]:
    """Of folders `restored-N`: no store is there, or the whole one."""
    for number in (1, 2):
        path = tree / f"restored-{number}"
        if (path / CATALOG).exists():
            yield from state_problems(path, state)
            yield from leftovers(path)
        elif path.name in facts:
            yield f"{path.name} was completed, and is no store"
        elif path.exists() and os.listdir(path):
            before = sorted(os.listdir(path))
            try:
                start_node(path).close()
            except InvalidArgument:
                pass
            else:
                yield f"half of a restored store was opened: {before}"
            if sorted(os.listdir(path)) != before:
                yield f"half of a restored store was written to: {sorted(os.listdir(path))}"


def state_problems(path: Path, state: Json) -> Iterator[str]:
    clock = LaterClock()
    clock.advance(3_600.0)
    node = start_node(path, clock)
    try:
        found = observed(call_of(node), frozenset())
        yield from differences(path.name, found, [state])
        yield from catalog_problems(node)
    finally:
        node.close()


def new_backup_problems(tree: Path, state: Json) -> Iterator[str]:
    backup(str(tree / "store"), str(tree / "new-backup"))
    restore(str(tree / "new-backup"), str(tree / "new-store"))
    yield from state_problems(tree / "new-store", state)


def problems_of(
    scenario: str, tree: Path, stores: dict[str, Expected], facts: set[str]
) -> Iterator[str]:
    if scenario in ("backup", "restore"):
        state = stores["store"].states[-1]
        yield from backup_problems(tree, facts, state)
        yield from restored_problems(tree, facts, state)
        yield from new_backup_problems(tree, state)
    for store, want in stores.items():
        if scenario.startswith("repair"):
            for problem in repair_problems(tree / store, facts):
                yield f"{store}: {problem}"
        later_s = SCENARIOS[scenario].later_s if scenario in SCENARIOS else 0.0
        for problem in check_store(tree / store, want, later_s):
            yield f"{store}: {problem}"


def check_trees(scenario: str, journal: str, *trees: str) -> list[str]:
    problems: list[str] = []
    wanted = expected(journal)
    for tree in trees:
        name = Path(tree).name
        try:
            for found in problems_of(scenario, Path(tree), *wanted):
                problems.append(f"{name}: {found}")  # One by one: the next may not be had.
        except Exception:
            problems.append(f"{name}: {traceback.format_exc()}")
    return problems


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(check_trees(*json.loads(line))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            print(json.dumps([f"the check ended with status {status}"]), flush=True)


if __name__ == "__main__":
    main()
