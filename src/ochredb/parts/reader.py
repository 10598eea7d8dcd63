"""Reading a part: sections of memory-mapped objects, verified before their first use.

A `Part` is immutable and shared by all threads; everything is opened on first use. Blocks are
checked once per process (`verified.py`): of the records those that are read, of other sections all
at once. Nothing of a block that fails is served. Damaged records or vectors raise Corrupt, naming
the object and the records; what is derived from them is made again in memory or done without
(`damaged` says so, for the compactor to build the part anew).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hnswlib
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ochredb.checksum import BLOCK_BYTES
from ochredb.configuration import IndexSettings
from ochredb.errors import Corrupt, NotFound
from ochredb.lazy import lazy
from ochredb.parts.columns import BytesColumn
from ochredb.parts.graph import HnswGraph, memory_bytes, read_file
from ochredb.parts.graph_links import GraphLinks
from ochredb.parts.graph_memory import GraphMemory
from ochredb.parts.ids import IdIndex
from ochredb.parts.manifest import TRUTH, Manifest
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.text import TextIndex
from ochredb.parts.verified import StoredColumn, VerifiedObject
from ochredb.parts.whole import told
from ochredb.parts.writer import squared_norms_of
from ochredb.segment import Rows
from ochredb.storage.base import LocalStore
from ochredb.types import Float32s, Int64s
from ochredb.vectors.codes import Codes, CodesOnUse, is_enough
from ochredb.vectors.distance import Space

log = logging.getLogger("ochredb.parts")

_T = TypeVar("_T")
_RECORDS = ("seq", "id", "document", "uri", "metadata")
_OPENED_WITH = {"record_batch": "_records"}  # Rows are read without all being verified.
_CODED_AT_ONCE_ROWS = 65_536  # 20 ms of 128 components: a graph takes longer to load.
_FRAME_BYTES = 64 << 10  # What Arrow itself reads lies this near to either end of its file.


class Part:
    """An immutable indexed set of rows: a Segment (see `ochredb.segment`)."""

    sorted_by_seq = True
    place = None

    def __init__(
        self,
        store: LocalStore,
        manifest: Manifest,
        settings: IndexSettings,
        on_damage: Callable[[str, str], None] = lambda _part, _problem: None,
        graphs: GraphMemory | None = None,
    ) -> None:
        """on_damage: told the part and the problem when something derived is found damaged.

        graphs: which loaded graphs it is one of; None: of its own.
        """
        self.manifest, self._store, self._settings = manifest, store, settings
        self._on_damage = on_damage
        self._graphs = graphs or GraphMemory()
        self.graph_turn = 0  # When the graph or the codes were used last.
        self.coded = CodesOnUse(is_useful=is_enough(manifest.rows, manifest.dimension))
        self.damaged: dict[str, str] = {}
        self._salvaged: dict[int, VerifiedObject] = {}
        self._objects: dict[int, VerifiedObject] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def dimension(self) -> int:
        return self.manifest.dimension

    @property
    def id(self) -> str:
        return self.manifest.id

    def _object(self, number: int) -> VerifiedObject:
        with self._lock:
            known = self._objects.get(number)
            if known is None:
                known = VerifiedObject(
                    self._store, self.manifest.objects[number], self.manifest.spans(number)
                )
                self._objects[number] = known
            return known

    def section(self, name: str) -> memoryview | None:
        """A section's verified bytes, or None if the part does not have it.

        Checking touches every page; of a large section most are not needed soon, so they are let
        go of.
        """
        place = self.manifest.sections.get(name)
        if place is None:
            return None
        found = self._object(place.object)
        with self._lock:
            data = found.verify(place.start, place.stop)
        if data.nbytes > BLOCK_BYTES:
            found.forget_pages()
        return data

    def truth(self, name: str) -> VerifiedObject | None:
        """The object of `records` or `vectors` as it is, damaged or not; None if it is missing."""
        number = self.manifest.sections[name].object
        with self._lock:
            known = self._objects.get(number) or self._salvaged.get(number)
            if known is None:
                info = self.manifest.objects[number]
                try:
                    known = VerifiedObject(
                        self._store, info, self.manifest.spans(number), salvage=True
                    )
                except NotFound:
                    return None
                self._salvaged[number] = known
            return known

    def _explained(self, error: Corrupt) -> Corrupt:
        """The same damage, naming the records that it hit."""
        names = tuple(
            name
            for name in TRUTH
            if self.manifest.objects[self.manifest.sections[name].object].key
            == error.detail.get("key")
        )
        if not names or "records" in error.detail:
            return error
        text, _ = told(self, names)
        return Corrupt(f"{error}: {text} cannot be read", key=error.detail["key"], records=text)

    def _derived(self, name: str, stored: Callable[[], _T], instead: Callable[[], _T]) -> _T:
        """What is stored or, if that is damaged, what stands in for it."""
        if name not in self.damaged:
            try:
                return stored()
            except Corrupt as error:
                if "records" in error.detail:
                    raise  # Not it is damaged, but what it is made of.
                problem = str(error)
            except NotFound as error:
                for truth in TRUTH:  # Collected, all of the part: the reader's version is too old.
                    self._store.map(self.manifest.objects[self.manifest.sections[truth].object].key)
                problem = str(error)
            self.damaged[name] = problem
            log.error("part %s goes on without its stored %s: %s", self.id, name, problem)
            self._on_damage(self.id, problem)
        return instead()

    def _required(self, name: str) -> memoryview:
        try:
            data = self.section(name)
        except Corrupt as error:
            raise (self._explained(error) if name in TRUTH else error) from error
        if data is None:
            raise Corrupt(f"part {self.id} has no section {name}")
        return data

    @lazy
    def record_batch(self) -> pa.RecordBatch:
        """Columns seq, id, document, uri, metadata; zero copy, all of it verified."""
        self._required("records")
        return self._records

    @lazy
    def _records(self) -> pa.RecordBatch:
        """The batch of which only the frame is verified: a column's buffers must be, before use."""
        place = self.manifest.sections.get("records")
        if place is None:
            raise Corrupt(f"part {self.id} has no section records")
        stored = self._object(place.object)
        try:
            stored.verify(place.start, min(place.start + _FRAME_BYTES, place.stop))
            stored.verify(max(place.stop - _FRAME_BYTES, place.start), place.stop)
        except Corrupt as error:
            raise self._explained(error) from error
        return self._batch(stored)

    def open_records(self) -> pa.RecordBatch:
        """The batch as it is, for salvage: only its frame has passed. Raises Corrupt, NotFound."""
        stored = self.truth("records")
        if stored is None:
            raise Corrupt(f"the records of part {self.id} are missing")
        place = self.manifest.sections["records"]
        starts = np.array([place.start, max(place.stop - _FRAME_BYTES, place.start)])
        stops = np.array([min(place.start + _FRAME_BYTES, place.stop), place.stop])
        if not stored.ranges_pass(starts, stops).all():
            raise Corrupt(f"the frame of the records of part {self.id} is damaged")
        return self._batch(stored)

    def _batch(self, stored: VerifiedObject) -> pa.RecordBatch:
        place = self.manifest.sections["records"]
        try:
            data = pa.py_buffer(stored.view[place.start : place.stop])
            batch = pa.ipc.open_file(data).get_batch(0)
        except MemoryError:  # Arrow's are ArrowExceptions, too: no damage.
            raise
        except pa.ArrowException as error:
            raise Corrupt(f"the records of part {self.id} are no Arrow file: {error}") from error
        if tuple(batch.schema.names) != _RECORDS or batch.num_rows != len(self):
            raise Corrupt(f"the records of part {self.id} have another shape")
        return batch

    @lazy
    def seqs(self) -> Int64s:
        array = self._records.column("seq")
        stored = self._object(self.manifest.sections["records"].object)
        buffer = array.buffers()[1]
        start = buffer.address - stored.address
        try:
            stored.verify(start, start + buffer.size)
        except Corrupt as error:
            raise self._explained(error) from error
        seqs: Int64s = array.to_numpy(zero_copy_only=True)
        return seqs

    def _column(self, name: str) -> StoredColumn:
        stored = self._object(self.manifest.sections["records"].object)
        try:
            return StoredColumn(stored, self._records.column(name))
        except Corrupt as error:
            raise self._explained(error) from error

    def _whole(self, column: StoredColumn) -> BytesColumn:
        try:
            return column.whole()
        except Corrupt as error:
            raise self._explained(error) from error

    def _of(self, column: StoredColumn, rows: Rows) -> BytesColumn:
        try:
            return column.of(rows)
        except Corrupt as error:
            raise self._explained(error) from error

    @lazy
    def ids(self) -> BytesColumn:
        return self._whole(self._column("id"))

    @lazy
    def _documents(self) -> StoredColumn:
        return self._column("document")

    @lazy
    def _uris(self) -> StoredColumn:
        return self._column("uri")

    @lazy
    def _metadatas(self) -> StoredColumn:
        return self._column("metadata")

    @lazy
    def documents(self) -> BytesColumn:
        return self._whole(self._documents)

    def _array(self, name: str, dtype: Any, count: int) -> NDArray[Any]:
        data = self._required(name)
        if data.nbytes != count * np.dtype(dtype).itemsize:
            raise Corrupt(f"section {name} of part {self.id} has {data.nbytes} bytes")
        return np.frombuffer(data, dtype)

    @lazy
    def vectors(self) -> Float32s:
        rows, dimension = len(self), self.manifest.dimension
        return self._array("vectors", np.float32, rows * dimension).reshape(rows, dimension)

    @lazy
    def squared_norms(self) -> Float32s:
        return self._derived(
            "norms",
            lambda: self._array("norms", np.float32, len(self)),
            lambda: squared_norms_of(self.vectors),
        )

    def codes(self, space: Space, *, makes: bool = True) -> Codes | None:
        self.graph_turn = self._graphs.turn
        if len(self) <= _CODED_AT_ONCE_ROWS:
            self.coded.expect()
        return self.coded.find(
            space,
            lambda: (self.vectors, self.squared_norms),
            lambda size_bytes: self._graphs.has_room(self, size_bytes),
            makes=makes,
        )

    @lazy
    def id_index(self) -> IdIndex:
        return self._derived(
            "ids", lambda: IdIndex.open(self.section), lambda: IdIndex.build(self.ids)
        )

    @lazy
    def metadata(self) -> MetadataIndex:
        return self._derived(
            "metadata",
            lambda: MetadataIndex.open(self.section),
            lambda: MetadataIndex.build(self._whole(self._metadatas)),
        )

    @lazy
    def text(self) -> TextIndex | None:
        if "text/directory" not in self.manifest.sections:
            return None
        return self._derived("text", lambda: TextIndex.open(self.section), lambda: None)

    @lazy
    def graph_rows(self) -> NDArray[np.int32] | None:
        """int32[labels]: the row of each label of a grown graph; None: labels are rows."""
        if "graph_rows" not in self.manifest.sections:
            return None
        rows: NDArray[np.int32] = self._array("graph_rows", np.int32, self.manifest.graph_labels)
        return rows

    @property
    def graph_labels(self) -> int:
        return 0 if "graph" in self.damaged else self.manifest.graph_labels

    @property
    def graph_neighbors(self) -> int:
        return self.manifest.graph_neighbors or self._settings.max_neighbors

    @property
    def graph_recall(self) -> tuple[tuple[int, float], ...]:
        return self.manifest.graph_recall

    @property
    def graph(self) -> HnswGraph | None:
        """The graph, loaded into memory on first use; None if there is none or it is damaged."""
        if not self.manifest.has_graph:
            return None
        self.graph_turn = self._graphs.turn
        return self._loaded_graph

    @lazy
    def _loaded_graph(self) -> HnswGraph | None:
        if "graph" not in self.damaged:
            needed = memory_bytes(self.manifest.graph_labels, self.dimension, self.graph_neighbors)
            self._graphs.loading(self, needed)
        return self._derived("graph", self._load_graph, lambda: None)

    def drop_graph(self) -> None:
        """Free the graph's memory, once the searches that use it end; it is loaded again on use."""
        if self.__dict__.get("_loaded_graph") is not None:
            self.__dict__.pop("_loaded_graph", None)

    @property
    def graph_bytes(self) -> int:
        """What the graph takes in memory; 0 if it is not loaded."""
        graph: HnswGraph | None = self.__dict__.get("_loaded_graph")
        return 0 if graph is None else graph.size_bytes

    @property
    def heap_bytes(self) -> int:
        """What graph and codes take, as far as they are in memory."""
        return self.graph_bytes + self.coded.size_bytes

    def drop_heap(self) -> None:
        """Free both; see `drop_graph`."""
        self.drop_graph()
        self.coded.drop()

    def _load_graph(self) -> HnswGraph:
        return HnswGraph(self.graph_index(), self.graph_rows)

    def graph_index(self, *, room: int = 0, max_neighbors: int = 0) -> hnswlib.Index:
        """The graph as stored, in an index of the caller's own.

        room: for so many more labels. max_neighbors: of what is inserted, if that is more than M (a
            graph of format 1 keeps its own). Graph and vectors are verified whole before hnswlib
            sees any.
        """
        labels, dimension = self.manifest.graph_labels, self.manifest.dimension
        if "graph" in self.manifest.sections:  # Of before part format 2.
            with self._graph_file() as path:
                index = read_file(path, self._settings, dimension, labels, room)
        else:
            links = GraphLinks.open(self.section).widened(max_neighbors)
            if (links.space, links.dimension) != (self._settings.space, dimension):
                raise Corrupt(f"the graph of part {self.id} is of another space")
            nodes = links.nodes(self.vectors, self.graph_rows)
            self.forget_pages()  # Else vectors would be in memory three times for a moment.
            index = links.index(nodes, room=room)
        if index.get_current_count() != labels:
            raise Corrupt(f"the graph of part {self.id} has {index.get_current_count()} labels")
        return index

    @contextlib.contextmanager
    def _graph_file(self) -> Any:
        """A path of the verified graph file of format 1, which hnswlib reads by path."""
        place = self.manifest.sections["graph"]
        data = self._required("graph")
        path = self._store.path(self.manifest.objects[place.object].key)
        if path is not None:
            yield path
            return
        with tempfile.NamedTemporaryFile(prefix="ochredb-graph-") as file:
            file.write(data)
            file.flush()
            yield file.name

    def forget_pages(self) -> None:
        """Let go of the resident pages of this part's objects; they stay in the page cache."""
        with self._lock:
            for item in self._objects.values():
                item.forget_pages()

    def has_open(self, names: Sequence[str]) -> bool:
        """Whether these attributes have been used before, so that using them costs no reading."""
        return all(_OPENED_WITH.get(name, name) in self.__dict__ for name in names)

    @property
    def graph_is_loaded(self) -> bool:
        return not self.manifest.has_graph or "_loaded_graph" in self.__dict__

    @property
    def verified_bytes(self) -> int:
        """How many bytes of its objects were read and checked so far."""
        with self._lock:
            return sum(item.verified_bytes for item in self._objects.values())

    def find_ids(self, ids: Sequence[str]) -> Rows:
        return self.id_index.lookup(ids, self.ids)

    def take_ids(self, rows: Rows) -> list[str]:
        names = self.ids.take_text(rows)
        assert None not in names
        return names  # type: ignore[return-value]

    def take_documents(self, rows: Rows) -> list[str | None]:
        return self._of(self._documents, rows).take_text(rows)

    def take_uris(self, rows: Rows) -> list[str | None]:
        return self._of(self._uris, rows).take_text(rows)

    def take_metadatas(self, rows: Rows) -> list[bytes | None]:
        return self._of(self._metadatas, rows).take(rows)

    def adopt_graph(self, index: hnswlib.Index, rows: NDArray[np.int32] | None) -> None:
        """Use the hnswlib index and the `graph_rows` that were saved; nobody changes them any more.

        Putting it together again would take time and memory for nothing.
        """
        with self._lock:
            self.__dict__["_loaded_graph"] = HnswGraph(index, rows)
        self._graphs.loaded(self)

    def warm(self) -> None:
        """Open what a first nearest-neighbour query will need, and have all of it on this machine.

        The graph is loaded beside all others: the one that it replaces is still being searched.
        """
        _ = self.vectors, self.squared_norms, self.ids, self._metadatas
        if not self.manifest.has_graph:
            self.coded.expect()  # However large it is.
            self.codes(self._settings.space)
        else:
            with self._lock:
                if "_loaded_graph" not in self.__dict__:
                    graph = self._derived("graph", self._load_graph, lambda: None)
                    self.__dict__["_loaded_graph"] = graph
            self._graphs.loaded(self)
        for number in range(len(self.manifest.objects)):
            self._object(number).bring()
