"""Reading a part: sections of memory-mapped objects, verified before their first use.

A `Part` is immutable and shared by all threads; everything is opened on first use. Blocks are
checked once per process (`verified.py`): of the records those that are read, of other sections all
at once; a mismatch raises Corrupt naming the object, and nothing of the block is served.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import hnswlib
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ochredb.checksum import BLOCK_BYTES
from ochredb.configuration import IndexSettings
from ochredb.errors import Corrupt
from ochredb.lazy import lazy
from ochredb.parts.columns import BytesColumn
from ochredb.parts.graph import HnswGraph, read_file
from ochredb.parts.graph_links import GraphLinks
from ochredb.parts.ids import IdIndex
from ochredb.parts.manifest import Manifest
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.text import TextIndex
from ochredb.parts.verified import StoredColumn, VerifiedObject
from ochredb.segment import Rows
from ochredb.storage.base import LocalStore
from ochredb.types import Float32s, Int64s

_RECORDS = ("seq", "id", "document", "uri", "metadata")
_OPENED_WITH = {"record_batch": "_records"}  # Rows are read without all being verified.
_FRAME_BYTES = 64 << 10  # What Arrow itself reads lies this near to either end of its file.


class Part:
    """An immutable indexed set of rows: a Segment (see `ochredb.segment`)."""

    sorted_by_seq = True

    def __init__(self, store: LocalStore, manifest: Manifest, settings: IndexSettings) -> None:
        self.manifest, self._store, self._settings = manifest, store, settings
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
                known = VerifiedObject(self._store, self.manifest.objects[number])
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

    def _required(self, name: str) -> memoryview:
        data = self.section(name)
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
        stored.verify(place.start, min(place.start + _FRAME_BYTES, place.stop))
        stored.verify(max(place.stop - _FRAME_BYTES, place.start), place.stop)
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
        stored.verify(start, start + buffer.size)
        seqs: Int64s = array.to_numpy(zero_copy_only=True)
        return seqs

    def _column(self, name: str) -> StoredColumn:
        stored = self._object(self.manifest.sections["records"].object)
        return StoredColumn(stored, self._records.column(name))

    @lazy
    def ids(self) -> BytesColumn:
        return self._column("id").whole()

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
        return self._documents.whole()

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
        return self._array("norms", np.float32, len(self))

    @lazy
    def id_index(self) -> IdIndex:
        return IdIndex.open(self.section)

    @lazy
    def metadata(self) -> MetadataIndex:
        return MetadataIndex.open(self.section)

    @lazy
    def text(self) -> TextIndex | None:
        if "text/directory" not in self.manifest.sections:
            return None
        return TextIndex.open(self.section)

    @lazy
    def graph_rows(self) -> NDArray[np.int32] | None:
        """int32[labels]: the row of each label of a grown graph; None: labels are rows."""
        if "graph_rows" not in self.manifest.sections:
            return None
        rows: NDArray[np.int32] = self._array("graph_rows", np.int32, self.manifest.graph_labels)
        return rows

    @property
    def graph_labels(self) -> int:
        return self.manifest.graph_labels

    @property
    def graph_recall(self) -> tuple[tuple[int, float], ...]:
        return self.manifest.graph_recall

    @property
    def graph(self) -> HnswGraph | None:
        """The graph, loaded into memory on first use; None if the part has none."""
        if not self.manifest.has_graph:
            return None
        return self._loaded_graph

    @lazy
    def _loaded_graph(self) -> HnswGraph:
        return HnswGraph(self.graph_index(), self.graph_rows)

    def graph_index(self, *, room: int = 0) -> hnswlib.Index:
        """The graph as stored, in an index of the caller's own.

        room: for so many more labels. Graph and vectors are verified whole before hnswlib sees any.
        """
        labels, dimension = self.manifest.graph_labels, self.manifest.dimension
        if "graph" in self.manifest.sections:  # Of before part format 2.
            with self._graph_file() as path:
                index = read_file(path, self._settings, dimension, labels, room)
        else:
            links = GraphLinks.open(self.section)
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

    @property
    def memory_bytes(self) -> int:
        """Heap bytes that dropping this object would free: the loaded graph's, in the main."""
        if not self.manifest.has_graph or not self.graph_is_loaded:
            return 4096
        return 4096 + self._loaded_graph.size_bytes

    def find_ids(self, ids: Sequence[str]) -> Rows:
        return self.id_index.lookup(ids, self.ids)

    def take_ids(self, rows: Rows) -> list[str]:
        names = self.ids.take_text(rows)
        assert None not in names
        return names  # type: ignore[return-value]

    def take_documents(self, rows: Rows) -> list[str | None]:
        return self._documents.of(rows).take_text(rows)

    def take_uris(self, rows: Rows) -> list[str | None]:
        return self._uris.of(rows).take_text(rows)

    def take_metadatas(self, rows: Rows) -> list[bytes | None]:
        return self._metadatas.of(rows).take(rows)

    def adopt_graph(self, index: hnswlib.Index, rows: NDArray[np.int32] | None) -> None:
        """Use the hnswlib index and the `graph_rows` that were saved; nobody changes them any more.

        Putting it together again would take time and memory for nothing.
        """
        with self._lock:
            self.__dict__["_loaded_graph"] = HnswGraph(index, rows)

    def warm(self) -> None:
        """Open what a first nearest-neighbour query will need."""
        _ = self.vectors, self.squared_norms, self.ids, self._metadatas, self.graph
