"""The tables of crash points and the source agree, and every durable step has a point.

That each point is also reached, and survived, is for `test_crash_points.py`.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ochredb.crash_points import POINTS, TRANSACTIONS

ROOT = Path(__file__).resolve().parents[2]
# Where the names of transactions are put together.
ASSEMBLED = ("src/ochredb/catalog/sqlite.py", "src/ochredb/catalog/postgres.py")
# Where a catalog in memory is filled, which is not durable.
IN_MEMORY = "src/ochredb/catalog/migrate.py"

# Calls that make something durable or remove it, as they are written in the source.
DURABLE = {
    "os.link", "os.rename", "os.replace", "os.unlink", "os.remove", "os.rmdir", "os.fsync",
    "files.sync", "files.sync_folder", "files.sync_parents", "files.publish",
    "files.unlink_if_exists", "write_synced", "sync_folders",
}  # fmt: skip
# Functions with such a call and no point, each with its reason.
WITHOUT_POINT = {
    "src/ochredb/storage/files.py": "the calls themselves; their callers have the points",
    "src/ochredb/parts/graph.py": "hnswlib's scratch files, gone with the process or swept",
    "src/ochredb/catalog/read_only.py:_copied": "a private copy, gone with the process",
    "src/ochredb/catalog/copies.py:_sync": "its callers have the points",
    "src/ochredb/backup/archive.py:sync_folders": "its callers have the points",
    "src/ochredb/catalog/seal_check.py:compare": "a seal that says nothing, gone or not",
    "src/ochredb/catalog/seal.py:_appended": "its callers have the points",
    "src/ochredb/catalog/migrate.py:_opened": "a second name of a log that is read anyway",
    "src/ochredb/catalog/migrate.py:_keep_log": "the same",
    "src/ochredb/backup/restore.py:_copy": "its callers, and `write_synced` itself",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("src", "services"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if "/testing/" not in name:
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    """Calls of a function of this name, or of a method if it begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
            if name.startswith(".") or ast.unparse(node.func) == name:
                yield node


def literal(call: ast.Call) -> str | None:
    first = call.args[0] if call.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def test_the_points_that_are_declared_and_those_in_the_source_are_the_same() -> None:
    reached = defaultdict(list)
    for name, tree in sources():
        for call in calls(tree, "reach"):
            point = literal(call)
            if name in ASSEMBLED and point is None:
                continue
            assert point is not None, f"{name}:{call.lineno}: a crash point is a literal"
            reached[point].append(f"{name}:{call.lineno}")
    undeclared = {point: places for point, places in reached.items() if point not in POINTS}
    assert not undeclared, f"not in POINTS of ochredb.crash_points: {undeclared}"
    assert POINTS.keys() == reached.keys(), f"reached nowhere: {POINTS.keys() - reached.keys()}"


def test_the_transactions_that_are_declared_and_those_in_the_source_are_the_same() -> None:
    begun = defaultdict(list)
    for name, tree in sources():
        for node in ast.walk(tree):
            items = node.items if isinstance(node, ast.With) else []
            for item in items:
                for call in (
                    *calls(item.context_expr, ".write"),
                    *calls(item.context_expr, ".write_beside"),
                ):
                    transaction = literal(call)
                    if (name == IN_MEMORY and not call.args) or (
                        name in ASSEMBLED and transaction is None
                    ):
                        continue
                    place = f"{name}:{call.lineno}"
                    assert transaction is not None, f"{place}: a transaction's name is a literal"
                    begun[transaction].append(place)
    undeclared = {found: places for found, places in begun.items() if found not in TRANSACTIONS}
    assert not undeclared, f"not in TRANSACTIONS of ochredb.crash_points: {undeclared}"
    assert TRANSACTIONS.keys() == begun.keys(), f"unused: {TRANSACTIONS.keys() - begun.keys()}"


def test_names_and_descriptions() -> None:
    assert all(point.count(".") == 1 for point in POINTS)
    assert not any("." in name for name in TRANSACTIONS)
    assert not any(point.partition(".")[0] in TRANSACTIONS for point in POINTS)
    assert all(text for text in (*POINTS.values(), *TRANSACTIONS.values()))


def test_every_durable_step_has_a_point() -> None:
    """A function that syncs, names or removes files reaches a crash point, or says why not."""
    bare = []
    for name, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            steps = {step for step in DURABLE if any(calls(node, step))}
            excused = name in WITHOUT_POINT or f"{name}:{node.name}" in WITHOUT_POINT
            if steps and not excused and not any(calls(node, "reach")):
                bare.append(f"{name}:{node.name} ({', '.join(sorted(steps))})")
    assert not bare, f"durable steps without a crash point (see CONTRIBUTING.md): {bare}"
