"""A graph stored without its vectors: what is put together again searches exactly as it did."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.configuration import IndexSettings, Space
from ochredb.errors import Corrupt, NewerFormat
from ochredb.parts import graph as graphs
from ochredb.parts.graph_links import GraphLinks, LabelRows
from ochredb.types import Float32s

from .kernel import ROOT
from .sections import section_source

SPACES: tuple[Space, ...] = ("l2", "cosine", "ip")


def _vectors(count: int, dimension: int, seed: int = 1) -> Float32s:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def _built(
    vectors: Float32s,
    space: Space = "l2",
    neighbors: int = 16,
    threads: int = 1,
    ef_construction: int = 100,
) -> hnswlib.Index:
    of = IndexSettings(space=space, max_neighbors=neighbors, ef_construction=ef_construction)
    return graphs.inserted(vectors, of, threads=threads, step=lambda: None)


def _read(links: GraphLinks) -> GraphLinks:
    return GraphLinks.open(section_source(links.sections()))


def _again(
    index: hnswlib.Index, vectors: Float32s, rows: LabelRows = None, room: int = 0
) -> hnswlib.Index:
    """The index through the bytes of a part."""
    links = _read(GraphLinks.of(index, vectors, rows))
    return links.index(links.nodes(vectors, rows), room=room)


def _by_label(index: hnswlib.Index) -> tuple[Any, Any]:
    """Each label's level-0 vector and neighbours, in order."""
    (state,) = index.__getstate__()
    count, size = state["cur_element_count"], state["size_data_per_element"]
    nodes = state["data_level0"].reshape(count, size)
    labels = nodes[:, state["label_offset"] :].copy().view(np.uint64)[:, 0]
    vectors = nodes[:, state["offset_data"] : state["label_offset"]].copy().view(np.uint32)
    links = nodes[:, : state["offset_data"]].copy().view(np.uint32)
    order = np.argsort(labels)
    neighbors = [labels[links[i, 1 : 1 + links[i, 0]]].tolist() for i in order]
    return vectors[order], neighbors


def _assert_equal(one: hnswlib.Index, other: hnswlib.Index, queries: Float32s) -> None:
    count = one.get_current_count()
    assert other.get_current_count() == count
    (vectors, neighbors), (other_vectors, other_neighbors) = _by_label(one), _by_label(other)
    assert vectors.tobytes() == other_vectors.tobytes()
    assert neighbors == other_neighbors
    for k in {1, min(10, count), min(60, count)}:
        one.set_ef(k)
        other.set_ef(k)
        try:
            expected = one.knn_query(queries, k=k, num_threads=1)
        except RuntimeError:  # So many cannot be reached.
            with pytest.raises(RuntimeError):
                other.knn_query(queries, k=k, num_threads=1)
            continue
        found = other.knn_query(queries, k=k, num_threads=1)
        assert found[0].tolist() == expected[0].tolist()
        assert found[1].tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("count", "threads"), [(1, 1), (2, 1), (33, 1), (3_000, 1), (6_000, 2)])
def test_what_is_read_back_is_the_same_graph(space: Space, count: int, threads: int) -> None:
    vectors = _vectors(count, 24)
    index = _built(vectors, space, threads=threads)
    links = GraphLinks.of(index, vectors, None)
    assert len(links.kept) == 0
    assert (links.factors is None) == (space != "cosine")
    stored = sum(len(bytes(data)) for data in links.sections().values())
    assert stored < 700 + count * 160  # Links, levels, factors; a vector would be 96 more.
    _assert_equal(index, _again(index, vectors), _vectors(20, 24, seed=2))


def test_a_graph_of_many_levels() -> None:
    vectors = _vectors(2_000, 8)
    index = _built(vectors, neighbors=2, threads=2)
    links = GraphLinks.of(index, vectors, None)
    assert links.levels.max() >= 4
    assert links.levels[links.entry] == links.levels.max()
    _assert_equal(index, _again(index, vectors), _vectors(20, 8, seed=2))


@pytest.mark.parametrize("space", SPACES)
def test_labels_of_dead_records_keep_their_vectors(space: Space) -> None:
    """A part has no row for them; a search still goes over them."""
    vectors = _vectors(500, 8)
    index = _built(vectors, space)
    alive = np.arange(500) % 5 != 2
    rows = np.where(alive, np.cumsum(alive) - 1, -1).astype(np.int32)
    links = GraphLinks.of(index, vectors[alive], rows)
    assert links.kept.tolist() == np.flatnonzero(~alive).tolist()
    again = _again(index, vectors[alive], rows)
    _assert_equal(index, again, _vectors(20, 8, seed=2))
    # What is grown from it has them too.
    more = _vectors(100, 8, seed=3)
    into = _again(index, vectors[alive], rows, room=100)
    of = IndexSettings(space=space)
    grown = graphs.inserted(more, of, threads=2, step=lambda: None, into=into)
    assert grown is into
    assert grown.get_current_count() == 600
    rows = np.concatenate([rows, 400 + np.arange(100)]).astype(np.int32)
    merged = np.concatenate([vectors[alive], more])
    assert GraphLinks.of(grown, merged, rows).kept.tolist() == links.kept.tolist()
    twice = _again(grown, merged, rows)
    _assert_equal(grown, twice, _vectors(20, 8, seed=2))
    _assert_equal(index, again, _vectors(5, 8, seed=4))  # Nobody has touched it.
    grown.set_ef(200)
    if space != "ip":
        found = grown.knn_query(merged[::50], k=1, num_threads=1)[0][:, 0]
        assert rows[found.astype(np.int64)].tolist() == list(range(0, 500, 50))


def test_growing_twice_draws_other_levels() -> None:
    """hnswlib begins its dice anew; the same throw each time would leave levels empty."""
    vectors = _vectors(900, 4)
    index = _built(vectors[:300])
    of = IndexSettings()
    for start in (300, 600):
        into = _again(index, vectors[:start], room=300)
        index = graphs.inserted(
            vectors[start : start + 300], of, threads=1, step=lambda: None, into=into
        )
    levels = GraphLinks.of(index, vectors, None).levels
    assert levels[:300].tolist() != levels[300:600].tolist() != levels[600:].tolist()


def test_cosine_of_the_longest_and_the_shortest_vectors() -> None:
    """Whatever hnswlib made of them by normalising is what it gets back."""
    vectors = np.concatenate(
        [
            _vectors(50, 3),
            np.float32(1e-21) * _vectors(50, 3, seed=2),  # Their squares are denormal.
            np.float32(1e-40) * _vectors(50, 3, seed=3),  # They are, and their squares are zero.
            np.float32(3e38) * np.sign(_vectors(50, 3, seed=4)),  # Their squares are infinite.
            np.zeros((3, 3), np.float32),
            -np.zeros((3, 3), np.float32),
            np.array([[0, 1, 0], [-1, 0, 0], [1e-30, 1, -1e-38]], np.float32),
        ]
    )
    index = _built(vectors, "cosine")
    _assert_equal(index, _again(index, vectors), _vectors(20, 3, seed=5))


@settings(max_examples=60, deadline=None)
@given(
    space=st.sampled_from(SPACES),
    count=st.integers(1, 400),
    dimension=st.integers(1, 40),
    neighbors=st.integers(2, 40),
    threads=st.integers(1, 2),
    dead=st.floats(0, 0.9),
    seed=st.integers(0, 1_000),
)
def test_any_graph_comes_back(
    space: Space, count: int, dimension: int, neighbors: int, threads: int, dead: float, seed: int
) -> None:
    vectors = np.round(_vectors(count, dimension, seed), seed % 4)  # Rounded, some are equal.
    index = _built(vectors, space, neighbors, threads)
    alive = np.random.default_rng(seed).random(count) >= dead
    alive[seed % count] = True
    rows = np.where(alive, np.cumsum(alive) - 1, -1).astype(np.int32)
    queries = _vectors(5, dimension, seed + 1)
    _assert_equal(index, _again(index, vectors[alive], rows), queries)


def test_a_file_of_format_1_is_read_and_grown(tmp_path: Path) -> None:
    vectors = _vectors(400, 6)
    of = IndexSettings(space="cosine")
    index = _built(vectors[:300], "cosine")
    path = str(tmp_path / "graph")
    index.save_index(path)
    _assert_equal(index, graphs.read_file(path, of, 6, 300, 0), _vectors(9, 6, seed=2))
    into = graphs.read_file(path, of, 6, 300, 100)
    grown = graphs.inserted(vectors[300:], of, threads=1, step=lambda: None, into=into)
    assert len(GraphLinks.of(grown, vectors, None).kept) == 0
    _assert_equal(grown, _again(grown, vectors), _vectors(9, 6, seed=2))
    (tmp_path / "graph").write_bytes((tmp_path / "graph").read_bytes()[:-1])
    with pytest.raises(Corrupt, match="cannot read the graph"):
        graphs.read_file(path, of, 6, 300, 0)


# -- bytes that are not what they were


class TestDamage:
    """Bytes with a right checksum that would lead hnswlib out of its memory are refused."""

    @pytest.fixture
    def stored(self) -> tuple[dict[str, Any], bytearray]:
        vectors = _vectors(300, 4)
        sections = GraphLinks.of(_built(vectors, "cosine", 4), vectors, None).sections()
        return orjson.loads(bytes(sections["graph/directory"])), bytearray(
            bytes(sections["graph/arrays"])
        )

    def _open(self, directory: Any, arrays: bytes | bytearray) -> GraphLinks:
        sections = {"graph/directory": orjson.dumps(directory), "graph/arrays": bytes(arrays)}
        return GraphLinks.open(section_source(sections))

    def _array(self, stored: tuple[dict[str, Any], bytearray], key: str, width: int = 1) -> Any:
        offset, dtype, count = stored[0][key]
        found = np.frombuffer(stored[1], dtype, count, offset)
        return found if width == 1 else found.reshape(-1, width)

    def test_it_is_right_before(self, stored: Any) -> None:
        assert len(self._open(*stored)) == 300

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", 1), ("format", None), ("factors", None), ("space", "hamming"),
            ("space", "l2"), ("labels", 299), ("labels", 0),
            ("labels", -1), ("labels", "300"), ("dimension", 0), ("dimension", None),
            ("max_neighbors", 0), ("max_neighbors", 5), ("entry", 300), ("entry", 1.5),
            ("links", None), ("links", [0, "<u4", 1]), ("upper_links", [8, "<u4", 7]),
            ("levels", [0, "|u1", 10_000_000]), ("kept_vectors", [0, "<f4", 4]),
        ],
    )  # fmt: skip
    def test_a_directory(self, stored: Any, key: str, value: Any) -> None:
        if (key, value) == ("space", "l2"):  # A graph of another space is the part's to refuse.
            assert self._open(stored[0] | {key: value}, stored[1]).space == "l2"
            return
        with pytest.raises(Corrupt):
            self._open(stored[0] | {key: value}, stored[1])

    def test_a_newer_format(self, stored: Any) -> None:
        with pytest.raises(NewerFormat, match="3"):
            self._open(stored[0] | {"format": 3}, stored[1])

    def test_arrays_that_are_missing(self, stored: Any) -> None:
        with pytest.raises(Corrupt):
            self._open(stored[0], stored[1][:-8])
        with pytest.raises(Corrupt):
            GraphLinks.open(section_source({}))

    @pytest.mark.parametrize(
        ("key", "width", "row", "column", "value"),
        [
            ("links", 9, 7, 1, 300), ("links", 9, 7, 8, 2**32 - 1), ("links", 9, 7, 0, 9),
            ("links", 9, 7, 0, 2**16), ("upper_links", 5, 3, 1, 300), ("upper_links", 5, 3, 0, 5),
        ],
    )  # fmt: skip
    def test_links(
        self, stored: Any, key: str, width: int, row: int, column: int, value: int
    ) -> None:
        self._array(stored, key, width)[row, column] = value
        with pytest.raises(Corrupt, match="out of the graph"):
            self._open(*stored)

    def test_a_link_to_a_label_without_that_level(self, stored: Any) -> None:
        low = np.flatnonzero(self._array(stored, "levels") == 0)[0]
        upper = self._array(stored, "upper_links", 5)
        upper[np.flatnonzero(upper[:, 0])[0], 1] = low
        with pytest.raises(Corrupt, match="out of the graph"):
            self._open(*stored)

    def test_levels(self, stored: Any) -> None:
        levels = self._array(stored, "levels")
        levels[np.flatnonzero(levels == 0)[0]] = 1
        with pytest.raises(Corrupt, match="out of the graph"):
            self._open(*stored)

    def test_an_entry_below_the_top(self, stored: Any) -> None:
        low = int(np.flatnonzero(self._array(stored, "levels") == 0)[0])
        with pytest.raises(Corrupt, match="out of the graph"):
            self._open(stored[0] | {"entry": low}, stored[1])

    def test_rows_that_are_not_those_of_the_graph(self) -> None:
        vectors = _vectors(50, 4)
        links = GraphLinks.of(_built(vectors), vectors, None)
        with pytest.raises(Corrupt, match="has a vector"):
            links.nodes(vectors[:49], None)
        everyone = np.arange(50, dtype=np.int32)
        for rows in (everyone[:49], everyone + 1, everyone - 1):
            with pytest.raises(Corrupt, match="has a vector"):
                links.nodes(vectors, rows)


_IN_LITTLE_MEMORY = """
    import re, resource
    import numpy as np
    from tests.unit.test_graph_links import GraphLinks, _built, _vectors

    vectors = _vectors(20_000, 512)
    index = _built(vectors, neighbors=2, ef_construction=4, threads=2)
    status = open("/proc/self/status").read()
    now = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", status)[1])
    resource.setrlimit(resource.RLIMIT_AS, (now + (16 << 20), resource.RLIM_INFINITY))
    try:
        GraphLinks.of(index, vectors, None)
    except MemoryError:
        print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_little_memory_is_an_error_and_no_crash() -> None:
    """hnswlib writes to the copy of its nodes without looking whether it got the memory."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_IN_LITTLE_MEMORY)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


@pytest.mark.parametrize("space", SPACES)
def test_a_widened_graph_answers_the_same_and_takes_more_neighbours(space: Space) -> None:
    vectors = _vectors(1_200, 16)
    index = _built(vectors[:600], space, neighbors=4)
    links = _read(GraphLinks.of(index, vectors[:600], None))
    assert links.widened(4) is links
    assert links.widened(3) is links
    wide = links.widened(12)
    assert wide.max_neighbors == 12
    plain = links.index(links.nodes(vectors[:600], None), room=600)
    wider = wide.index(wide.nodes(vectors[:600], None), room=600)
    _assert_equal(plain, wider, _vectors(20, 16, seed=2))
    for grown in (plain, wider):
        grown.add_items(vectors[600:], np.arange(600, 1_200), num_threads=1)
    assert max(map(len, _by_label(plain)[1])) <= 8
    before, after = _by_label(plain)[1], _by_label(wider)[1]
    assert max(map(len, after[:600])) > 8, "older ones, too"
    assert np.mean(list(map(len, after))) > 1.3 * np.mean(list(map(len, before)))
    again = _again(wider, vectors)
    _assert_equal(wider, again, _vectors(20, 16, seed=3))
    assert again.M == 12
