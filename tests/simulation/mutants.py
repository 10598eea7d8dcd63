"""Faults planted in the protocol, one at a time: each must be found within 200 seeds.

python -m tests.simulation.mutants      # How many seeds each takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ochredb.catalog import objects as object_table
from ochredb.catalog.appends import AppendRequest, Appends
from ochredb.catalog.core import bindparam, func, select
from ochredb.catalog.jobs import holds
from ochredb.catalog.logs import LogTable
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.objects import ObjectTable
from ochredb.catalog.schema import fragments, logs
from ochredb.catalog.statement import Statement
from ochredb.catalog.versions import VersionTable
from ochredb.ids import uuid7_time_us
from ochredb.materialise import Fold
from ochredb.replay import read_fragments
from ochredb.testing.simulation.mutants import mutated
from ochredb.types import Appended
from ochredb_compactor import compaction, merge
from ochredb_log import group_commit
from ochredb_log.flush import Flusher
from ochredb_log.service import LogService

from .run import simulate

SEEDS_MAX = 200
POSTGRESQL = {"dialect": "postgresql"}
ROUTED = {"routed": True, "calls_lost": 0.05}


@dataclass(frozen=True, slots=True)
class Mutant:
    """plant: makes the fault for as long as the context lasts. weather: the one it shows in."""

    name: str
    plant: Callable[[], AbstractContextManager[None]]
    weather: Mapping[str, Any] = field(default_factory=dict)


def _acknowledged_early(self: Any, requests: list[AppendRequest]) -> list[Appended]:
    answers, ends = [], dict[str, int]()
    for request in requests:
        end = ends.get(request.collection)
        if end is None:
            end = self._table.snapshot(request.collection).last_offset
        ends[request.collection] = end + request.count
        answers.append(Appended(end + 1, end + request.count))
    # The threads that the log itself sees: those of the simulation.
    vars(group_commit)["threading"].Thread(target=self._table.append, args=(requests,)).start()
    return answers


def _due_by_age(session: Any, cutoff_us: int, limit: int) -> list[tuple[str]]:
    due = session.all(object_table._DUE, cutoff_us=1 << 62, limit=limit)
    return [row for row in due if uuid7_time_us(row[0].split("/")[1]) <= cutoff_us]


_snapshot_end = Statement(
    select(logs.c.indexed_offset, logs.c.next_offset, logs.c.floor_offset).where(
        logs.c.collection == bindparam("collection")
    )
)
# The row is locked and its log is read by one statement, which sees the log as it was before.
_lock_and_join = Statement(
    select(
        logs.c.dimension,
        func.coalesce(
            select(func.max(fragments.c.stop) + 1)
            .where(fragments.c.collection == logs.c.collection)
            .scalar_subquery(),
            logs.c.next_offset,
        ),
        logs.c.indexed_offset,
        logs.c.tail_bytes,
        logs.c.time_us,
        logs.c.revision,
    )
    .where(logs.c.collection == bindparam("collection"))
    .with_for_update()
)
_not_locked = Statement(
    select(
        logs.c.dimension,
        logs.c.next_offset,
        logs.c.indexed_offset,
        logs.c.tail_bytes,
        logs.c.time_us,
        logs.c.revision,
    ).where(logs.c.collection == bindparam("collection"))
)
_lock = "statement = _LOCK_FREE if skip_locked else _LOCK"

MUTANTS = [
    Mutant(
        "acknowledge before the commit",
        lambda: mutated(
            Flusher._flush_once,
            ("return self._table.append(requests)", "return early(self, requests)"),
            (
                "return self._table.append(requests, skip_locked=True)",
                "return early(self, requests)",
            ),
            early=_acknowledged_early,
        ),
    ),
    Mutant(
        "a compaction does not compare the version",
        lambda: mutated(compaction.compact, ("if version != snapshot.version:", "if False:")),
    ),
    Mutant(
        "a commit ignores the fencing number",
        lambda: mutated(holds, ("row[1] == lease.fence", "True")),
    ),
    Mutant(
        "the grace counts from the object's creation",
        lambda: mutated(
            ObjectTable.mark_due,
            (
                "in session.all(_DUE, cutoff_us=cutoff_us, limit=limit):",
                "in by_age(session, cutoff_us, limit):",
            ),
            ("if not session.all(_ANY_DUE, cutoff_us=cutoff_us, limit=1):", "if False:"),
            by_age=_due_by_age,
        ),
    ),
    Mutant(
        "the sweep commits no row before it deletes",
        lambda: mutated(
            ObjectTable.condemn,
            (
                'session.run(\n                _INSERT, key=key, size=0, state="swept", '
                "unreferenced_us=now_us\n            )",
                "session.one(_STATE, key=key) is None",
            ),
        ),
    ),
    Mutant(
        "an offset is used again",
        lambda: mutated(
            Appends._decided,
            (
                "log.next_offset += request.count",
                "log.next_offset += request.count - (request.count > 2)",
            ),
        ),
    ),
    Mutant(
        "an update of nothing inserts",
        lambda: mutated(
            Fold._apply_distinct,
            (
                "if operations.op is not Op.UPDATE:",
                "if operations.op is not Op.UPDATE or operations.embeddings is not None:",
            ),
        ),
    ),
    Mutant(
        "a merge forgets what was deleted meanwhile",
        lambda: mutated(
            merge._died_meanwhile,
            ("if latest.deleted_count == item.deleted_count:", "if True:"),
        ),
    ),
    Mutant(
        "a snapshot is read in two statements",
        lambda: mutated(
            LogTable.snapshot,
            (
                "row = session.one(_SNAPSHOT, collection=collection)",
                "row = session.one(_SNAPSHOT, collection=collection)\n"
                "        end = session.one(snapshot_end, collection=collection)\n"
                "        row = None if row is None or end is None else (*row[:5], *end)",
            ),
            snapshot_end=_snapshot_end,
        ),
    ),
    Mutant(
        "the log is locked and joined in one statement",
        lambda: mutated(
            Appends._lock,
            (_lock, "statement = lock_and_join"),
            lock_and_join=_lock_and_join,
        ),
        POSTGRESQL,
    ),
    Mutant(
        "a log that another has locked is not passed over",
        lambda: mutated(
            Appends._lock,
            (_lock, "statement = not_locked if skip_locked else _LOCK"),
            not_locked=_not_locked,
        ),
        POSTGRESQL,
    ),
    Mutant(
        "idempotency is looked up before the lock",
        lambda: mutated(
            Appends.append,
            ("earlier = self._applied(requests, found)", "earlier = early"),
            (
                "found = self._lock(",
                "names = [request.collection for request in requests]\n"
                "    early = self._applied(requests, dict.fromkeys(names, True))\n"
                "    found = self._lock(",
            ),
        ),
        POSTGRESQL,
    ),
    Mutant(
        "a repeat does not look whether the first attempt landed",
        lambda: mutated(LogService._append_resolved, ("may_be_repeat=True", "may_be_repeat=False")),
    ),
    Mutant(
        "a name is looked up only by the node that had it before",
        lambda: mutated(
            LogService._request, ("may_be_repeat=request_id is not None", "may_be_repeat=False")
        ),
        ROUTED,
    ),
    Mutant(
        "names are forgotten with their fragments",
        lambda: mutated(VersionTable._advance, ("repeats.keep_names(", 'str.format("", ')),
        ROUTED,
    ),
    Mutant(
        "the expected offset is not compared",
        lambda: mutated(
            Appends._refusal,
            ("request.expect_last_offset not in (None, log.next_offset - 1)", "False"),
        ),
    ),
    Mutant(
        "the log is trimmed beyond what is indexed",
        lambda: mutated(
            VersionTable._advance,
            (
                "session.later(_TRIM, collection=collection, floor=new.indexed_offset)",
                "session.later(_TRIM, collection=collection, floor=new.indexed_offset + 3)",
            ),
        ),
    ),
    Mutant(
        "a read does not notice holes in the log",
        lambda: mutated(
            read_fragments,
            (
                "for place in _page(table, collection, expected, last):",
                "places = table.fragments(collection, expected, last, _PAGE_FRAGMENTS)\n"
                "        if not places:\n"
                "            return\n"
                "        for place in places:",
            ),
            ("_check_end(collection, first, last, expected)", "pass"),
        ),
    ),
    Mutant(
        "a swept object may be introduced",
        lambda: mutated(
            object_table.introduce_shared, ('if row is None or row[0] != "live":', "if False:")
        ),
    ),
    Mutant(
        "a drop keeps its references",
        lambda: mutated(
            object_table.release_collections,
            ("session.run_many(_RELEASE_COLLECTION, holders)", "pass"),
        ),
    ),
    Mutant(
        "two let go of one object, and neither is the last",  # Likewise.
        lambda: mutated(
            object_table.lock,
            ('session.each(_LOCK, [{"key": key} for key in sorted(set(keys))])', "pass"),
        ),
        # Without kills and leaps more of them are at work at once.
        POSTGRESQL | {"inline_bytes_max": 0, "kills": False, "leaps": False},
    ),
    Mutant(
        "two may create one name",  # Found by the simulator in OchreDB itself.
        lambda: mutated(
            Namespace.create_collection,
            ("session.one(_LOCK_DATABASE,", "session.one(_GET_DATABASE,"),
        ),
        POSTGRESQL,
    ),
]


def seeds_needed(mutant: Mutant, seeds_max: int = SEEDS_MAX) -> tuple[int, str] | None:
    """How many seeds it took, and what was found; None if nothing was."""
    with mutant.plant():
        for seed in range(seeds_max):
            outcome = simulate(seed, **mutant.weather)
            if outcome.violations:
                found = outcome.violations[0]
                assert "Error: " not in found or "IntegrityError" in found, found  # Malformed.
                return seed + 1, found.splitlines()[0]
    return None


def main() -> int:
    missed = 0
    for mutant in MUTANTS:
        found = seeds_needed(mutant)
        missed += found is None
        print(f"{mutant.name}: {found or 'NOT FOUND'}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
