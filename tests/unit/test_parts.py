"""Parts: what is written is read, and what is damaged is named, not served (I12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.checksum import BLOCK_BYTES, block_checksums
from ochredb.configuration import IndexSettings
from ochredb.errors import Corrupt, NewerFormat, NotFound
from ochredb.ids import IdSource
from ochredb.parts import deleted as deleted_rows
from ochredb.parts import graph as graphs
from ochredb.parts.graph_links import GraphLinks
from ochredb.parts.manifest import Manifest
from ochredb.parts.reader import Part
from ochredb.parts.whole import whole_rows
from ochredb.parts.writer import (
    ALIGNMENT_BYTES,
    TEXT_INDEX_ROWS_MIN,
    GraphSections,
    PartRows,
    _checksums,
    write_part,
)
from ochredb.plan.filter import evaluate
from ochredb.storage.base import LocalStore
from ochredb.storage.directory import DirectoryStore
from ochredb.storage.memory import MemoryStore
from ochredb.where import Compare

SETTINGS = IndexSettings(ef_construction=64, ef_search=50, max_neighbors=8)


def _rows(count: int, dimension: int, *, text_bytes: int = 30) -> PartRows:
    rng = np.random.default_rng(count)
    numbers = range(count)
    texts = [None if i % 5 == 4 else f"{i} täxt ".ljust(text_bytes, "x") for i in numbers]
    return PartRows(
        seqs=np.cumsum(1 + np.arange(count) % 3),
        ids=pa.array([f"id-{i}" for i in numbers], pa.large_string()),
        documents=pa.array(texts, pa.large_string()),
        uris=pa.array([f"u:{i}" if i % 2 else None for i in numbers], pa.large_string()),
        metadatas=pa.array(
            [b'{"n":%d}' % i if i % 3 else None for i in numbers], pa.large_binary()
        ),
        vectors=rng.standard_normal((count, dimension)).astype(np.float32),
    )


def _graph(rows: PartRows) -> GraphSections:
    index = graphs.inserted(rows.vectors, SETTINGS, threads=1, step=lambda: None)
    return GraphSections(links=GraphLinks.of(index, rows.vectors, None), rows=None)


def _write(store: LocalStore, rows: PartRows, graph: GraphSections | None = None) -> Manifest:
    return write_part(store, IdSource().uuid7(), rows, graph, lambda: None)


def _assert_equal(part: Part, rows: PartRows) -> None:
    count = len(rows.seqs)
    everything = np.arange(count)
    assert len(part) == count
    assert part.dimension == rows.vectors.shape[1]
    assert part.seqs.tolist() == rows.seqs.tolist()
    assert part.vectors.tobytes() == rows.vectors.tobytes()
    np.testing.assert_allclose(part.squared_norms, (rows.vectors**2).sum(axis=1), rtol=1e-5)
    assert part.take_ids(everything) == rows.ids.to_pylist()
    assert part.take_documents(everything) == rows.documents.to_pylist()
    assert part.take_uris(everything) == rows.uris.to_pylist()
    assert part.take_metadatas(everything) == rows.metadatas.to_pylist()
    wanted = ["id-0", "nobody", f"id-{count - 1}"]
    assert part.find_ids(wanted).tolist() == [0, -1, count - 1]
    matching = evaluate(Compare("n", "$lt", 5), part, None)
    assert np.flatnonzero(matching).tolist() == [i for i in range(5) if i % 3]


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    return MemoryStore() if request.param == "memory" else DirectoryStore(str(tmp_path / "objects"))


def test_a_small_part_is_one_packed_object(store: LocalStore) -> None:
    rows = _rows(100, 8)
    manifest = _write(store, rows)
    assert [item.key for item in manifest.objects] == [f"parts/{manifest.id}/packed"]
    assert [item.key for item in store.list("")] == [item.key for item in manifest.objects]
    assert (manifest.seq_min, manifest.seq_max) == (rows.seqs[0], rows.seqs[-1])
    assert manifest.size_bytes == sum(item.size for item in store.list(""))
    assert all(place.start % ALIGNMENT_BYTES == 0 for place in manifest.sections.values())
    part = Part(store, manifest, SETTINGS)
    _assert_equal(part, rows)
    assert part.text is None
    assert part.graph is None
    assert part.graph_is_loaded


def test_a_large_part_is_split_and_has_every_index(store: LocalStore) -> None:
    rows = _rows(TEXT_INDEX_ROWS_MIN + 100, 1_000)
    manifest = _write(store, rows)
    names = [item.key.rsplit("/", 1)[1] for item in manifest.objects]
    assert names == ["records", "vectors", "index"]
    part = Part(store, manifest, SETTINGS)
    _assert_equal(part, rows)
    assert part.text is not None
    candidates = part.text.candidates(b"1233 t")
    assert candidates is not None
    assert 1233 in candidates.tolist()
    assert part.vectors.ctypes.data % 16 == 0


def test_a_graph_finds_the_rows_of_its_part(store: LocalStore) -> None:
    rows = _rows(500, 8)
    manifest = _write(store, rows, _graph(rows))
    part = Part(store, manifest, SETTINGS)
    assert not part.graph_is_loaded
    graph = part.graph
    assert graph is not None
    assert part.graph_is_loaded
    assert part.graph_bytes > 500 * 8 * 4
    part.drop_graph()
    assert part.graph_bytes == 0
    assert not part.graph_is_loaded
    for row in range(0, 500, 37):
        found = graph.search(part.vectors[row : row + 1], 100)
        assert found is not None
        assert found[0, 0] == row
        exact = np.argsort(((part.vectors - part.vectors[row]) ** 2).sum(axis=1))[:5]
        assert len(set(found[0, :5].tolist()) & set(exact.tolist())) >= 4
    everything = graph.search(part.vectors[:1], 10_000)
    assert everything is None or sorted(everything[0].tolist()) == list(range(500))
    together = graph.search(part.vectors[:7], 50)
    assert together is not None
    for row in range(7):
        alone = graph.search(part.vectors[row : row + 1], 50)
        assert alone is not None
        assert together[row].tolist() == alone[0].tolist()


def test_a_grown_graph_equals_the_rows_it_was_given(store: LocalStore) -> None:
    """Labels of old rows lead to their new places, those of dead rows nowhere."""
    rows = _rows(300, 8)
    old = Part(store, _write(store, rows, _graph(rows)), SETTINGS)
    more = np.random.default_rng(7).standard_normal((100, 8)).astype(np.float32)
    into = old.graph_index(room=100)
    index = graphs.inserted(more, SETTINGS, threads=1, step=lambda: None, into=into)
    alive = np.arange(300) % 4 != 0
    kept = np.where(alive, np.cumsum(alive) - 1, -1)
    labels = np.concatenate([kept, alive.sum() + np.arange(100)]).astype(np.int32)
    merged = _rows(int(alive.sum()) + 100, 8)
    merged = replace(merged, vectors=np.concatenate([rows.vectors[alive], more]))
    links = GraphLinks.of(index, merged.vectors, labels)
    manifest = _write(store, merged, GraphSections(links=links, rows=labels))
    part = Part(store, manifest, SETTINGS)
    assert (part.graph_labels, len(part)) == (400, 325)
    graph = part.graph
    assert graph is not None
    hits = 0
    for row in range(0, 325, 9):
        found = graph.search(part.vectors[row : row + 1], 200)
        assert found is not None
        assert found.shape == (1, 200)
        assert found.min() == -1
        assert found.max() < 325
        hits += row in found[0].tolist()
    assert hits == len(range(0, 325, 9))


@pytest.mark.parametrize("space", ["l2", "cosine", "ip"])
def test_graphs_of_every_space(space: str) -> None:
    settings = replace(SETTINGS, space=space)  # type: ignore[arg-type]
    store, rows = MemoryStore(), _rows(200, 6)
    index = graphs.inserted(rows.vectors, settings, threads=1, step=lambda: None)
    graph = GraphSections(links=GraphLinks.of(index, rows.vectors, None), rows=None)
    part = Part(store, _write(store, rows, graph), settings)
    assert part.graph is not None
    found = part.graph.search(rows.vectors[5:6], 100)
    assert found is not None
    if space == "ip":
        assert found[0, 0] == np.argmax(rows.vectors @ rows.vectors[5])
    else:
        assert found[0, 0] == 5


def test_a_builder_that_gives_up_leaves_nothing_that_counts() -> None:
    store, steps = MemoryStore(), []

    def step() -> None:
        steps.append(1)
        if len(steps) == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write_part(store, IdSource().uuid7(), _rows(50, 4), None, step)


class TestDamage:
    """One flipped bit, one missing byte: found at first use, by name."""

    def _damaged(self, manifest: Manifest, store: MemoryStore, key: str, at: int) -> Part:
        """The part on a store whose one object has one bit flipped."""
        copy = MemoryStore()
        for item in manifest.objects:
            content = bytearray(store.get(item.key))
            if item.key == key:
                content[at] ^= 1
            copy.create(item.key, content)
        return Part(copy, manifest, SETTINGS)

    def _use_everything(self, part: Part) -> None:
        for name in part.manifest.sections:
            part.section(name)
        _ = part.record_batch, part.vectors, part.id_index, part.metadata, part.graph

    def test_any_flipped_bit_of_a_section_is_found(self) -> None:
        store, rows = MemoryStore(), _rows(300, 16)
        manifest = _write(store, rows, _graph(rows))
        for place in manifest.sections.values():
            key = manifest.objects[place.object].key
            for at in {place.start, (place.start + place.stop) // 2, place.stop - 1}:
                if place.start < place.stop:
                    with pytest.raises(Corrupt, match=key):
                        self._use_everything(self._damaged(manifest, store, key, at))

    def test_damage_in_one_object_leaves_the_others_usable(self) -> None:
        store, rows = MemoryStore(), _rows(400, 6_000)
        manifest = _write(store, rows)
        place = manifest.sections["vectors"]
        key = manifest.objects[place.object].key
        part = self._damaged(manifest, store, key, place.stop - 5)
        with pytest.raises(Corrupt, match=rf"block \d+ of {key}"):
            _ = part.vectors
        assert part.take_ids(np.array([3])) == ["id-3"]

    def test_the_table_itself_is_checked(self) -> None:
        store = MemoryStore()
        manifest = _write(store, _rows(50, 4))
        (item,) = manifest.objects
        part = self._damaged(manifest, store, item.key, item.size - 3)
        with pytest.raises(Corrupt, match="table"):
            part.section("norms")
        alone = replace(manifest, truth_checksums={})  # As of a release without them.
        with pytest.raises(Corrupt, match="table"):
            _ = self._damaged(alone, store, item.key, item.size - 3).vectors

    @pytest.mark.parametrize("cut", [1, 100, 10**9])
    def test_a_truncated_object_is_found_at_opening(self, cut: int) -> None:
        store, copy = MemoryStore(), MemoryStore()
        manifest = _write(store, _rows(50, 4))
        (item,) = manifest.objects
        copy.create(item.key, store.get(item.key)[: max(0, item.size - cut)])
        alone = replace(manifest, truth_checksums={})
        for read in (
            lambda: Part(copy, alone, SETTINGS).vectors,
            lambda: Part(copy, manifest, SETTINGS).section("norms"),
        ):
            with pytest.raises(Corrupt, match=rf"{item.key} has \d+ bytes instead of {item.size}"):
                read()

    def test_records_and_vectors_outlive_their_neighbours(self) -> None:
        """Of an object that holds all of a small part: whatever is not theirs may be damaged."""
        store, rows = MemoryStore(), _rows(50, 4)
        manifest = _write(store, rows)
        (item,) = manifest.objects
        end = manifest.sections["vectors"].stop
        content = store.get(item.key)
        assert set(manifest.truth_checksums) == {"records", "vectors"}
        zeros = bytes(item.size - end)
        for damaged in (content[:end] + zeros, content[:end], content + b"x"):
            copy = MemoryStore()
            copy.create(item.key, damaged)
            part = Part(copy, Manifest.from_json(manifest.to_json()), SETTINGS)
            assert np.array_equal(part.vectors, rows.vectors)
            assert part.take_ids(np.arange(50)) == [f"id-{row}" for row in range(50)]
            assert whole_rows(part).all()
            right = np.einsum("ij,ij->i", rows.vectors, rows.vectors)
            np.testing.assert_allclose(part.squared_norms, right, rtol=1e-6)
            _ = part.id_index, part.metadata, part.record_batch

    def test_damaged_records_are_not_served_for_their_own_checksum(self) -> None:
        store = MemoryStore()
        manifest = _write(store, _rows(50, 4))
        key = manifest.objects[0].key
        for name in ("records", "vectors"):
            place = manifest.sections[name]
            for at in range(place.start, place.stop, 37):
                part = self._damaged(manifest, store, key, at)
                with pytest.raises(Corrupt, match=key):
                    _ = part.vectors if name == "vectors" else part.record_batch

    def test_a_missing_object_is_not_damage_yet(self) -> None:
        store = MemoryStore()
        manifest = _write(store, _rows(50, 4))
        store.delete(manifest.objects[0].key)
        with pytest.raises(NotFound, match=manifest.objects[0].key):
            _ = Part(store, manifest, SETTINGS).vectors

    def test_a_manifest_that_does_not_fit_its_objects(self) -> None:
        store = MemoryStore()
        manifest = _write(store, _rows(50, 4))

        def use(part: Part) -> Callable[[], object]:
            return lambda: (part.vectors, part.record_batch)

        for wrong in (replace(manifest, rows=49), replace(manifest, dimension=5)):
            with pytest.raises(Corrupt, match=manifest.id):
                use(Part(store, wrong, SETTINGS))()
        outside = replace(manifest.sections["vectors"], stop=10**6)
        sections = manifest.sections | {"vectors": outside}
        with pytest.raises(Corrupt, match="outside"):
            use(Part(store, replace(manifest, sections=sections), SETTINGS))()
        del sections["vectors"]
        with pytest.raises(Corrupt, match="no section vectors"):
            use(Part(store, replace(manifest, sections=sections), SETTINGS))()


class TestManifest:
    def test_json_round_trip(self) -> None:
        manifest = _write(MemoryStore(), _rows(20, 4))
        assert Manifest.from_json(manifest.to_json()) == manifest

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version"'])
    def test_what_is_no_manifest(self, text: str) -> None:
        with pytest.raises(Corrupt, match="not a part manifest"):
            Manifest.from_json(text)

    def test_a_newer_format_is_refused(self) -> None:
        text = _write(MemoryStore(), _rows(20, 4)).to_json()
        newer = text.replace('"format_version":2', '"format_version":3')
        assert newer != text
        with pytest.raises(NewerFormat, match="version 3; this OchreDB reads up to 2: install"):
            Manifest.from_json(newer)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=5),
    exact=st.booleans(),
)
def test_checksums_of_pieces_are_those_of_the_whole(sizes: list[int], exact: bool) -> None:
    if exact:
        sizes = [*sizes, -sum(sizes) % BLOCK_BYTES]
    whole = np.random.default_rng(1).bytes(sum(sizes))
    pieces, start = [], 0
    for size in sizes:
        pieces.append(memoryview(whole)[start : start + size])
        start += size
    pieces = [piece for piece in pieces if piece.nbytes]
    assert _checksums(pieces, len(whole)).tolist() == block_checksums(whole).tolist()


class TestDeletedRows:
    @given(rows=st.sets(st.integers(0, 5_000), min_size=1))
    def test_round_trip(self, rows: set[int]) -> None:
        live = deleted_rows.decode(deleted_rows.encode(np.array(sorted(rows))), 5_001)
        assert set(np.flatnonzero(~live).tolist()) == rows

    def test_damage(self) -> None:
        data = deleted_rows.encode(np.arange(0, 3_000, 7))
        for at in range(0, len(data), 5):
            damaged = bytearray(data)
            damaged[at] ^= 16
            if 4 <= at < 8:
                continue  # Not used yet.
            with pytest.raises(Corrupt):
                deleted_rows.decode(bytes(damaged), 3_000)
        for cut in (0, 1, 15, 16, len(data) - 1):
            with pytest.raises(Corrupt):
                deleted_rows.decode(data[:cut], 3_000)

    def test_rows_that_do_not_exist(self) -> None:
        with pytest.raises(Corrupt, match="does not exist"):
            deleted_rows.decode(deleted_rows.encode(np.array([10])), 10)


def test_a_graph_of_another_collection_is_refused(store: LocalStore) -> None:
    rows = _rows(100, 8)
    manifest = _write(store, rows, _graph(rows))
    for other, expected in (
        (manifest, replace(SETTINGS, space="cosine")),
        (replace(manifest, dimension=4, rows=200), SETTINGS),
        (replace(manifest, graph_labels=99), SETTINGS),
    ):
        part = Part(store, other, expected)
        with pytest.raises(Corrupt, match="the graph of part"):
            part.graph_index()
        assert part.graph is None
        assert "the graph of part" in part.damaged["graph"]


def test_a_built_graph_is_searched_as_the_same_one_loaded(store: LocalStore) -> None:
    """Whoever calibrated it left another candidate list behind."""
    rows = _rows(600, 8)
    index = graphs.inserted(rows.vectors, SETTINGS, threads=1, step=lambda: None)
    index.set_ef(500)
    part = Part(store, _write(store, rows, _graph(rows)), SETTINGS)
    part.adopt_graph(index, None)
    adopted = part.graph
    loaded = Part(store, part.manifest, SETTINGS).graph
    assert adopted is not None and loaded is not None
    assert index.ef == 1
    for row in range(0, 600, 50):
        one, other = (graph.search(rows.vectors[row : row + 1], 12) for graph in (adopted, loaded))
        assert one is not None and other is not None
        assert one.tolist() == other.tolist()


def test_each_bit_of_a_bitmap_counts() -> None:
    data = deleted_rows.encode(np.array([3, 4, 9]))
    assert not deleted_rows.decode(data, 10)[[3, 4, 9]].any()
    for place in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(Corrupt):
            deleted_rows.decode(bytes(damaged), 10)
