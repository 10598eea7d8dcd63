"""Mutilates, checks and reads, case after case, in a process whose exit code is watched.

    python -m tests.damage.worker STORE SCRATCH ANSWERS HOW FIRST STOP

STORE is whole; ANSWERS is the file with its answers. HOW open: another process has the catalog open
and writes, before its files are mutilated and after, and is killed. Prints a line when a case (a
seed) begins and a JSON object when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import shutil
import signal
import sqlite3
import sys
from typing import Any

import orjson

from ochredb.catalog.migrate import open_directory
from ochredb.catalog.sqlite import SqliteDatabase, SqliteSession
from ochredb.clock import SystemClock
from ochredb.errors import OchreError
from ochredb.ids import IdSource
from ochredb.integrity import check

from .mutilate import CATALOG, GUARDS, WAL, Mutilation, copy_store, mutilate, mutilate_in_place
from .stores import answers, configure, open_node

_WITH_COMPACTION_ONE_IN = 3
_LIVE = (
    "INSERT INTO tenants (name, resource_name) VALUES (?, ?)"
    " ON CONFLICT (name) DO UPDATE SET resource_name = excluded.resource_name"
)


def one_case(
    store: str, scratch: str, right: dict[str, Any], seed: int, how: str
) -> dict[str, Any]:
    """What became of one mutilation."""
    rng = random.Random(seed)
    damaged, checked = os.path.join(scratch, "damaged"), os.path.join(scratch, "checked")
    for path in (damaged, checked):
        shutil.rmtree(path, ignore_errors=True)
    copy_store(store, damaged)
    done = _while_open(damaged, rng) if how == "open" else mutilate(damaged, rng)
    copy_store(damaged, checked)
    rows = _rows(damaged) if done.file.startswith(CATALOG) else None
    case: dict[str, Any] = {"seed": seed, "file": done.file, "how": done.how, "start": done.start}
    try:
        report = check(checked)
        case["found"] = [f"{item.place}: {item.problem}" for item in report.findings]
    except OchreError as error:
        case["found"] = [f"{type(error).__name__}: {error}"]
    case["wrong"], case["errors"], case["bugs"] = _read(damaged, right, rng)
    if done.file in GUARDS.values():
        case["matters"] = case["errors"] > 0
    elif not case["found"] or case["wrong"]:
        case["matters"] = rows is None or rows != _rows(store)
    return case


def _while_open(path: str, rng: random.Random) -> Mutilation:
    """Another process has the catalog open, writes, goes on after the mutilation, and is killed."""
    turns = [rng.randrange(4) for _ in range(2)]
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            database, _ = open_directory(path, SystemClock(), IdSource())
            _work(database, turns[0] + 1)
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            _work(database, turns[1])
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(ready[1])
    os.read(ready[0], 1)
    try:
        return mutilate_in_place(path, rng)
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (ready[0], *go):
            os.close(descriptor)


def _work(database: SqliteDatabase, turns: int) -> None:
    """Rows that no answer has, each copied to the file at times."""
    for turn in range(turns):
        with contextlib.suppress(OchreError), database.write("tenant-create") as session:
            assert isinstance(session, SqliteSession)
            session.connection.execute(_LIVE, (f"live-{turn}", os.urandom(500).hex()))
        if turn % 2 == 0:
            with contextlib.suppress(OchreError):
                database.checkpoint()


def _read(path: str, right: dict[str, Any], rng: random.Random) -> tuple[list[str], int, list[str]]:
    """Wrong answers, how many errors, and errors that were not foreseen."""
    try:
        node = open_node(path)
    except OchreError:
        return [], 1, []
    wrong, errors, bugs = [], 0, []
    try:
        again = rng.randrange(_WITH_COMPACTION_ONE_IN) == 0
        for turn in range(2 if again else 1):
            if turn:
                compact(node)
            for name, (status, body) in answers(node).items():
                if (status, body) in map(tuple, right[name]):
                    continue
                if status == 200:
                    wrong.append(name)
                else:
                    errors += 1
                    if "Internal error" in body:
                        bugs.append(f"{name}: {body[:200]}")
    finally:
        try:
            node.close()
        except OchreError:
            errors += 1
    return wrong, errors, bugs


def compact(node: Any) -> None:
    """Whatever comes of it, answers stay right."""
    try:
        node.compactor.rebuild_damaged()
        infos = node.namespace.list_collections("default_tenant", "default_database", None, 0)
    except OchreError:
        return
    for info in infos:
        try:
            node.compactor.compact_now(info.id)
        except OchreError:
            continue


def _rows(path: str) -> str:
    """A digest of all rows of a catalog, or what kept them from being read."""
    copy = path + ".rows"
    shutil.rmtree(copy, ignore_errors=True)
    os.makedirs(copy)
    for name in (CATALOG, WAL):
        if os.path.exists(os.path.join(path, name)):
            shutil.copyfile(os.path.join(path, name), os.path.join(copy, name))
    digest = hashlib.sha256()
    connection = sqlite3.connect(os.path.join(copy, CATALOG))
    try:
        names = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        digest.update(repr(names).encode())
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'"):
            for row in sorted(map(repr, connection.execute(f"SELECT * FROM {name}"))):
                if "live-" not in row:
                    digest.update(row.encode())
    except (sqlite3.Error, UnicodeDecodeError) as error:
        return str(error)
    finally:
        connection.close()
        shutil.rmtree(copy)
    return digest.hexdigest()


def main() -> None:
    store, scratch, answers_file, how, first, stop = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    configure()
    with open(answers_file, "rb") as file:
        right = orjson.loads(file.read())
    for seed in range(int(first), int(stop)):
        print(f"begin {seed}", flush=True)
        print(orjson.dumps(one_case(store, scratch, right, seed, how)).decode(), flush=True)


if __name__ == "__main__":
    main()
