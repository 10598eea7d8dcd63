"""A tail that moves to the next version as it is equals the tail folded anew over that version."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ochredb import materialise
from ochredb.configuration import IndexSettings
from ochredb.ids import IdSource
from ochredb.materialise import Fold
from ochredb.parts.reader import Part
from ochredb.parts.writer import write_part
from ochredb.segment import SegmentView
from ochredb.storage.memory import MemoryStore
from ochredb.types import Op, Operations
from ochredb_compactor.gather import rows_of_parts, rows_of_tail

from .kernel import Model, operations, rows_of_view

EXAMPLES = int(os.environ.get("OCHREDB_MOVED_EXAMPLES", "150"))
IDS = [f"id-{number}" for number in range(12)]
# Few of these change a record that lives: a tail with such a change does not move.
_inserting = st.tuples(
    st.sampled_from([Op.ADD, Op.ADD, Op.ADD, Op.UPSERT, Op.UPDATE, Op.DELETE, Op.NOOP]),
    st.lists(st.sampled_from(IDS), min_size=1, max_size=4),
)
_steps = st.one_of(
    _inserting,
    _inserting,
    st.tuples(st.just("insert"), st.integers(1, 5)),
    st.tuples(st.just("compact"), st.integers(1, 4)),
    st.tuples(st.just("merge"), st.integers(2, 3)),
    st.tuples(st.just("read"), st.just(0)),
    st.tuples(st.just("follow"), st.integers(1, 3)),
)


@dataclass
class World:
    """A log, the parts that a compactor made of its beginning, and what a reader holds."""

    store: MemoryStore = field(default_factory=MemoryStore)
    ids: IdSource = field(default_factory=IdSource)
    model: Model = field(default_factory=Model)
    log: list[tuple[int, Operations]] = field(default_factory=list)
    base: list[SegmentView] = field(default_factory=list)
    version: int = 0
    indexed: int = 0
    reader: Fold = field(default_factory=lambda: Fold(0, 0, []))
    moves: int = 0

    def append(self, request: Operations) -> None:
        self.log.append((self.model.next_offset, request))
        self.model.apply(request)

    def folded(self, fold: Fold, fragments: int | None = None) -> Fold:
        """Fold what the log holds beyond it, or only so many fragments of it."""
        if fold.dimension is None and any(item.dimension for _, item in self.log):
            fold.dimension = 2  # As a snapshot says.
        rest = [item for item in self.log if item[0] > fold.last_offset]
        for _ in fold.apply_all(rest[:fragments]):
            pass
        return fold

    def compact(self, fragments: int) -> None:
        """Make a part of the oldest fragments of the tail."""
        fold = self.folded(Fold(self.version, self.indexed, self.base), fragments)
        self.base = [view for view in fold.base if view.live_count]
        chunks = fold.tail_live_rows()
        if chunks:
            self._add_part(rows_of_tail(chunks))
        self.version, self.indexed = self.version + 1, fold.last_offset

    def merge(self, count: int) -> None:
        """Make one part of the oldest ones."""
        inputs, rest = self.base[:count], self.base[count:]
        if len(inputs) < 2:
            return
        rows = [
            (
                view.segment,
                np.arange(len(view.segment)) if view.live is None else np.flatnonzero(view.live),
            )
            for view in inputs
        ]
        merged, _ = rows_of_parts(self.store, rows, lambda: None)  # type: ignore[arg-type]
        self.base = rest
        self._add_part(merged)
        self.version += 1

    def _add_part(self, rows: Any) -> None:
        manifest = write_part(self.store, self.ids.uuid7(), rows, None, lambda: None)
        part = Part(self.store, manifest, IndexSettings())
        self.base = [*self.base, SegmentView(part, None, manifest.rows, manifest.id)]

    def read(self) -> None:
        """Catch up as `LoadedCollection` does, and compare with folding anew."""
        anew = self.folded(Fold(self.version, self.indexed, self.base))
        old = self.reader
        if old.version != self.version:
            before = old.freeze()
            rows = rows_of_view(before)
            moved = old.moved(self.version, self.indexed, self.base)
            assert rows_of_view(before) == rows, "a view once taken stays valid"
            if moved is None:
                reaches = old.indexed_offset <= self.indexed <= old.last_offset
                assert not reaches or not old._only_inserted
                moved = Fold(self.version, self.indexed, self.base)
            else:
                self.moves += 1
            self.reader = moved
        self.folded(self.reader)
        view, expected = self.reader.freeze(), anew.freeze()
        assert rows_of_view(view) == rows_of_view(expected) == self.model.rows()
        assert view.count == expected.count == len(self.model.records)
        for name in ("version", "indexed_offset", "last_offset", "dimension"):
            assert getattr(view, name) == getattr(expected, name), name
        assert self.reader.tail_rows >= view.count - sum(item.live_count for item in self.base)
        found = np.array(view.find_ids(IDS)) if view.segments else None
        lives = set() if found is None else {IDS[i] for i in np.flatnonzero((found >= 0).any(0))}
        assert lives == set(self.model.records) & set(IDS)
        assert found is None or ((found >= 0).sum(0) <= 1).all(), "an id lives once"


def _request(op: Op, ids: list[str], number: int) -> Operations:
    if op in (Op.DELETE, Op.NOOP):
        return operations(op, ids)
    vectors = [(number, position) for position in range(len(ids))]
    return operations(
        op,
        ids,
        vectors,
        documents=[f"{number}" if position % 2 else None for position in range(len(ids))],
        metadatas=[{"n": number} if position % 3 else None for position in range(len(ids))],
    )


@settings(deadline=None, max_examples=EXAMPLES)
@given(script=st.lists(_steps, max_size=25), chunk_rows=st.sampled_from([1, 3, 256]))
def test_a_moved_tail_equals_the_log_folded_anew(script: list[Any], chunk_rows: int) -> None:
    """I5: duplicate adds, unknown ids, no-ops, partial compactions, merges, several moves."""
    world = World()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(materialise, "_CHUNK_ROWS_MIN", chunk_rows)
        patched.setattr(materialise, "_CHUNK_BYTES_MAX", 0)
        patched.setattr(materialise, "_BATCH_ROWS", 3)
        for number, (step, how) in enumerate(script):
            if step == "compact":
                world.compact(how)
            elif step == "merge":
                world.merge(how)
            elif step == "insert":
                names = [f"new-{number}-{i}" for i in range(how)]
                world.append(_request(Op.ADD, names, number))
            elif step == "read":
                world.read()
            elif step == "follow":
                world.read()
                world.compact(how)
                world.read()
            else:
                world.append(_request(step, how, number))
        world.read()
    event(f"moves: {min(world.moves, 3)}")


def test_three_moves_in_a_row_over_chunks_and_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rarest of the above, always."""
    monkeypatch.setattr(materialise, "_CHUNK_ROWS_MIN", 2)
    monkeypatch.setattr(materialise, "_CHUNK_BYTES_MAX", 0)
    world = World()
    for number in range(12):
        world.append(_request(Op.ADD, [f"id-{number}", "id-0"], number))
        world.append(_request(Op.UPDATE, ["nobody"], number))
    world.append(_request(Op.NOOP, ["", ""], 12))
    world.read()
    for count in (3, 1, 7):
        world.compact(count)
        world.read()
    world.merge(3)
    world.read()
    assert world.moves == 4
    assert len(world.reader.chunks) > 2
    world.append(_request(Op.UPSERT, ["id-1", "id-11"], 13))
    world.read()
    world.compact(2)
    world.read()
    assert world.moves == 4, "a row was replaced"
