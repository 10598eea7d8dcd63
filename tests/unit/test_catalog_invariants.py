"""What docs/formats/catalog.md says always holds, after every step of random lives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, select

from ochredb.catalog.database import Session
from ochredb.catalog.schema import metadata
from ochredb.catalog.statement import Statement
from ochredb.parts import deleted as deleted_rows
from ochredb.parts.manifest import Manifest
from ochredb.types import Op
from ochredb_node.node import Node

from .kernel import (
    ManualClock,
    add_rows,
    append,
    ids_of,
    make_collection,
    object_keys,
    operations,
    running_node,
)

_STEPS = ("add", "add", "delete", "update", "fold", "compact", "collect", "sweep", "drop", "wait")


def _rows(session: Session, table: Table) -> list[dict[str, Any]]:
    names = [column.name for column in table.columns]
    rows = session.all(Statement(select(table)))
    return [dict(zip(names, row, strict=True)) for row in rows]


def _check(node: Node) -> None:
    with node.database.read() as session:
        tables = {table.name: _rows(session, table) for table in metadata.sorted_tables}
    objects = {row["key"]: row for row in tables["objects"]}
    held = {row["key"] for row in tables["object_references"]}
    for key in held:
        assert objects[key]["state"] == "live", "5"
        assert objects[key]["unreferenced_us"] is None, "5"
        assert key in object_keys(node), "I6: nothing referenced is ever missing"
    for key, row in objects.items():
        assert row["state"] in ("live", "deleting", "swept"), "7"
        assert key in held or row["state"] != "live" or row["unreferenced_us"] is not None, "6"
    collections = {row["collection"] for row in tables["logs"]}
    for name in ("fragments", "versions", "version_parts", "parts", "object_references"):
        assert {row["collection"] for row in tables[name]} <= collections, "9"
    for log in tables["logs"]:
        _check_log(log, tables)


def _check_log(log: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> None:
    mine = {
        name: [row for row in rows if row.get("collection") == log["collection"]]
        for name, rows in tables.items()
    }
    assert log["floor_offset"] <= log["indexed_offset"] < log["next_offset"], "1"
    expected, tail_bytes = log["floor_offset"] + 1, 0
    references = {(r["key"], r["kind"], r["number"]) for r in mine["object_references"]}
    for row in sorted(mine["fragments"], key=lambda item: int(item["start"])):
        assert row["start"] == expected, "1"
        expected = row["stop"] + 1
        if row["object_key"] is None:
            tail_bytes += len(row["payload"])
        else:
            assert row["payload"] is None
            assert (row["object_key"], "fragment", row["start"]) in references, "4"
            tail_bytes += row["byte_stop"] - row["byte_start"]
    assert expected == log["next_offset"], "1"
    assert tail_bytes == log["tail_bytes"], "the backlog's limits are exact"
    versions = {row["version"]: row for row in mine["versions"]}
    newest = log["version"]
    assert set(versions) <= {newest - 1, newest} - {0}, "2"
    assert newest == 0 or newest in versions, "2"
    if newest:
        assert versions[newest]["indexed_offset"] == log["indexed_offset"], "2"
    manifests = {row["id"]: Manifest.from_json(row["manifest"]) for row in mine["parts"]}
    assert set(manifests) == {row["part"] for row in mine["version_parts"]}, "4"
    for row in mine["version_parts"]:
        keys = [item.key for item in manifests[row["part"]].objects]
        keys += [row["deleted_key"]] if row["deleted_key"] else []
        assert all((key, "version", row["version"]) in references for key in keys), "4"
        assert (row["deleted_count"] == 0) == (row["deleted"] is row["deleted_key"] is None), "8"


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "objects"])
@settings(deadline=None, max_examples=12)
@given(script=st.lists(st.tuples(st.sampled_from(_STEPS), st.integers(0, 1)), max_size=25))
def test_every_step_keeps_what_always_holds(inline: bool, script: list[tuple[str, int]]) -> None:
    clock = ManualClock()
    with (
        pytest.MonkeyPatch.context() as monkey,
        running_node(clock=clock, inline_bytes_max=(1 << 18) if inline else 0) as node,
    ):
        monkey.setattr(deleted_rows, "INLINE_BYTES_MAX", (32 << 10) if inline else 0)
        made = [make_collection(node, f"c{number}") for number in range(2)]
        expected: list[list[str]] = [[], []]
        added = 0
        for verb, which in script:
            collection, ids = made[which], expected[which]
            if verb == "add":
                add_rows(node, collection, added, 6)
                ids += [f"id-{number}" for number in range(added, added + 6)]
                added += 6
            elif verb == "delete" and ids:
                append(node, collection, operations(Op.DELETE, [ids.pop(len(ids) // 2)]))
            elif verb == "update" and ids:
                append(node, collection, operations(Op.UPDATE, [ids[0]], documents=["new"]))
            elif verb == "fold":
                node.compactor.fold_now(collection)
            elif verb == "compact":
                node.compactor.compact_now(collection)
            elif verb in ("collect", "sweep"):
                node.compactor.collect_now(sweep_orphans=verb == "sweep")
            elif verb == "drop":
                node.namespace.delete_collection("default_tenant", "default_database", f"c{which}")
                made[which], expected[which] = make_collection(node, f"c{which}"), []
            elif verb == "wait":
                clock.advance(61)
            _check(node)
            assert [ids_of(node, name) for name in made] == expected
