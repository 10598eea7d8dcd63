"""Reading a part: sections of memory-mapped objects, verified before their first use.

A `Part` is immutable and shared by all threads; everything is opened on first use. A section's
blocks are checked once per process against the object's table of checksums, whose own checksum is
in the catalog; a mismatch raises Corrupt naming the object, and nothing of it is served.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3
from ochredb.configuration import IndexSettings
from ochredb.errors import Corrupt
from ochredb.lazy import lazy
from ochredb.parts.columns import BytesColumn
from ochredb.parts.graph import HnswGraph
from ochredb.parts.ids import IdIndex
from ochredb.parts.manifest import Manifest, ObjectInfo
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.text import TextIndex
from ochredb.segment import Rows
from ochredb.storage.base import LocalStore
from ochredb.types import Float32s, Int64s

_RECORDS = ("seq", "id", "document", "uri", "metadata")


class VerifiedObject:
    """One mapped object; `verify` checks the blocks that a byte range touches, each once."""

    def __init__(self, store: LocalStore, info: ObjectInfo) -> None:
        self.key, self._store = info.key, store
        self.view = store.map(info.key)
        if self.view.nbytes != info.size:
            raise Corrupt(f"{info.key} has {self.view.nbytes} bytes instead of {info.size}")
        if not info.has_table:
            self.data_bytes, self._block_bytes = info.size, max(1, info.size)
            self._expected = np.array([info.checksum], np.uint64)
        else:
            # size = data + 8 bytes for each started block of data.
            blocks = -(-info.size // (BLOCK_BYTES + 8))
            self.data_bytes, self._block_bytes = info.size - 8 * blocks, BLOCK_BYTES
            table = self.view[self.data_bytes :]
            if xxh3(table) != info.checksum:
                raise Corrupt(f"the checksum table of {info.key} is damaged")
            self._expected = np.frombuffer(table, np.uint64)
        self._verified = np.zeros(len(self._expected), np.bool_)

    def verify(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), checked. Cost on first use: 0.1 ms per MB, in page cache."""
        if not 0 <= start <= stop <= self.data_bytes:
            raise Corrupt(f"{self.key}: a section lies outside of the object")
        size = self._block_bytes
        first, last = start // size, -(-stop // size)
        if not self._verified[first:last].all():
            data = self.view[first * size : min(last * size, self.data_bytes)]
            wrong = np.flatnonzero(block_checksums(data, size) != self._expected[first:last])
            if len(wrong):
                raise Corrupt(f"block {first + int(wrong[0])} of {self.key} fails its checksum")
            self._verified[first:last] = True
        return self.view[start:stop]

    def forget_pages(self) -> None:
        """Let go of resident pages (they stay in the page cache): after a pass over everything."""
        self._store.forget_pages(self.view)


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
        """Columns seq, id, document, uri, metadata; zero copy."""
        data = self._required("records")
        try:
            batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
        except pa.ArrowException as error:
            raise Corrupt(f"the records of part {self.id} are no Arrow file: {error}") from error
        if tuple(batch.schema.names) != _RECORDS or batch.num_rows != len(self):
            raise Corrupt(f"the records of part {self.id} have another shape")
        return batch

    @lazy
    def seqs(self) -> Int64s:
        seqs: Int64s = self.record_batch.column("seq").to_numpy(zero_copy_only=True)
        return seqs

    def _column(self, name: str) -> BytesColumn:
        return BytesColumn.from_arrow(self.record_batch.column(name))

    @lazy
    def ids(self) -> BytesColumn:
        return self._column("id")

    @lazy
    def documents(self) -> BytesColumn:
        return self._column("document")

    @lazy
    def uris(self) -> BytesColumn:
        return self._column("uri")

    @lazy
    def metadatas(self) -> BytesColumn:
        return self._column("metadata")

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
    def graph(self) -> HnswGraph | None:
        """The graph, loaded into memory on first use; None if the part has none."""
        if not self.manifest.has_graph:
            return None
        return self._loaded_graph

    @lazy
    def _loaded_graph(self) -> HnswGraph:
        with self.graph_file() as path:
            graph = HnswGraph.load(path, self._settings, self.manifest.dimension, self.graph_rows)
        if graph.labels != self.manifest.graph_labels:
            raise Corrupt(f"the graph of part {self.id} has {graph.labels} labels")
        return graph

    @contextlib.contextmanager
    def graph_file(self) -> Any:
        """A path of the verified graph file, for hnswlib, which reads by path."""
        place = self.manifest.sections["graph"]
        data = self._required("graph")  # Verified whole before hnswlib sees it.
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
        return all(name in self.__dict__ for name in names)

    @property
    def graph_is_loaded(self) -> bool:
        return not self.manifest.has_graph or "_loaded_graph" in self.__dict__

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
        return self.documents.take_text(rows)

    def take_uris(self, rows: Rows) -> list[str | None]:
        return self.uris.take_text(rows)

    def take_metadatas(self, rows: Rows) -> list[bytes | None]:
        return self.metadatas.take(rows)

    def warm(self) -> None:
        """Open what a first nearest-neighbour query will need."""
        _ = self.vectors, self.squared_norms, self.ids, self.metadatas, self.graph
