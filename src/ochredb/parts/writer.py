"""Writing a part: rows in, immutable objects and a manifest out (docs/formats/part.md).

Truth is `records` and `vectors`; every other section is derived from them here. A part below
8 MiB is one packed object, so thousands of small collections do not become tens of thousands of
files; a larger one is an object for each of records, vectors, index. A graph always has its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3
from ochredb.crash_points import reach
from ochredb.errors import OchreError
from ochredb.parts.columns import BytesColumn
from ochredb.parts.graph_links import GraphLinks
from ochredb.parts.ids import IdIndex
from ochredb.parts.manifest import TRUTH, Manifest, ObjectInfo, SectionPlace
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.text import TextIndex
from ochredb.storage.base import ObjectStore
from ochredb.types import Float32s, Int64s

ALIGNMENT_BYTES = 64
PACKED_BYTES_MAX = 8 << 20
TEXT_INDEX_ROWS_MIN = 2_048  # Below, one search over the joined documents is as fast.

Data = bytes | memoryview | NDArray[Any] | Any  # Any: a pyarrow Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRows:
    """Live rows, ascending by seq. Arrow columns are large_string / large_binary.

    records: the finished section that the columns lie in, if there is one. forget_pages: lets go of
        resident pages, if columns and vectors are mapped; called after each pass over them.
    """

    seqs: Int64s
    ids: pa.Array
    documents: pa.Array
    uris: pa.Array
    metadatas: pa.Array
    vectors: Float32s
    records: memoryview | None = None
    forget_pages: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        count = len(self.seqs)
        assert count > 0 and self.vectors.shape[0] == count
        assert all(len(c) == count for c in (self.ids, self.documents, self.uris, self.metadatas))
        assert self.vectors.dtype == np.float32
        assert bool(np.all(self.seqs[1:] > self.seqs[:-1])), "rows ascend by seq"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSections:
    """A graph and, if it was grown, the row of each label (int32[m], -1 = dead)."""

    links: GraphLinks
    rows: NDArray[np.int32] | None


def write_part(
    store: ObjectStore,
    part_id: str,
    rows: PartRows,
    graph: GraphSections | None,
    step: Callable[[], None],
) -> Manifest:
    """Build every section, create the objects, return the manifest. Nothing refers to them yet.

    step: called between pieces of work; it may raise to give up.
    If it fails, what was written is deleted: each new attempt would fill a full disk further.
    """

    def done() -> None:
        rows.forget_pages()
        step()

    groups: dict[str, dict[str, Data]] = {
        "records": {"records": _records(rows) if rows.records is None else rows.records},
        "vectors": {"vectors": np.ascontiguousarray(rows.vectors)},
        "index": {"norms": squared_norms_of(rows.vectors)},
    }
    done()
    index = groups["index"]
    index.update(IdIndex.build(BytesColumn.from_arrow(rows.ids)).sections())
    done()
    index.update(MetadataIndex.build(BytesColumn.from_arrow(rows.metadatas)).sections())
    done()
    if len(rows.seqs) >= TEXT_INDEX_ROWS_MIN and rows.documents.null_count < len(rows.seqs):
        index.update(TextIndex.build(BytesColumn.from_arrow(rows.documents)).sections())
        done()
    if graph is not None and graph.rows is not None:
        index["graph_rows"] = graph.rows
    truth = {name: groups[name][name] for name in TRUTH}
    truth_checksums: dict[str, int] = {}
    total = sum(_bytes_of(data).nbytes for group in groups.values() for data in group.values())
    if total < PACKED_BYTES_MAX:
        truth_checksums = {name: xxh3(_bytes_of(data)) for name, data in truth.items()}
        groups = {"packed": {k: v for group in groups.values() for k, v in group.items()}}
    if graph is not None:
        groups["graph"] = graph.links.sections()
    objects: list[ObjectInfo] = []
    places: dict[str, SectionPlace] = {}
    try:
        for name, sections in groups.items():
            info, offsets = _create(store, f"parts/{part_id}/{name}", sections)
            for section, (start, stop) in offsets.items():
                places[section] = SectionPlace(len(objects), start, stop)
            objects.append(info)
            reach("part.object-created")
            done()
    except BaseException:
        discard(store, [item.key for item in objects])
        raise
    reach("part.written")
    return Manifest(
        id=part_id,
        rows=len(rows.seqs),
        dimension=rows.vectors.shape[1],
        graph_labels=0 if graph is None else len(graph.links),
        seq_min=int(rows.seqs[0]),
        seq_max=int(rows.seqs[-1]),
        objects=tuple(objects),
        sections=places,
        graph_neighbors=0 if graph is None else graph.links.max_neighbors,
        truth_checksums=truth_checksums,
    )


def discard(store: ObjectStore, keys: Iterable[str]) -> None:
    """Delete objects that nothing will refer to. They would be swept as orphans, but much later."""
    for key in keys:
        with contextlib.suppress(OchreError):  # Then the sweep does it.
            store.delete(key)
    reach("discard.done")


def _bytes_of(data: Data) -> memoryview:
    """The bytes of a C-contiguous buffer, one-dimensional."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _create(
    store: ObjectStore, key: str, sections: dict[str, Data]
) -> tuple[ObjectInfo, dict[str, tuple[int, int]]]:
    """One object: the sections, each aligned, then the table of block checksums."""
    pieces: list[memoryview] = []
    offsets: dict[str, tuple[int, int]] = {}
    size = 0
    for name, data in sections.items():
        view = _bytes_of(data)
        padding = -size % ALIGNMENT_BYTES
        if padding:
            pieces.append(memoryview(bytes(padding)))
            size += padding
        offsets[name] = (size, size + view.nbytes)
        if view.nbytes:
            pieces.append(view)
        size += view.nbytes
    table = _bytes_of(_checksums(pieces, size))
    store.create(key, [*pieces, table])
    return ObjectInfo(key, size + table.nbytes, xxh3(table)), offsets


def _checksums(pieces: Sequence[memoryview], size: int) -> NDArray[np.uint64]:
    """Checksums of the blocks of the joined pieces, without joining more than a block."""
    if size <= BLOCK_BYTES:
        return block_checksums(b"".join(pieces))
    out: list[NDArray[np.uint64]] = []
    pending: list[memoryview] = []
    pending_bytes = 0
    for piece in pieces:
        start = 0
        if pending_bytes:
            start = min(BLOCK_BYTES - pending_bytes, piece.nbytes)
            pending.append(piece[:start])
            pending_bytes += start
            if pending_bytes < BLOCK_BYTES:
                continue
            out.append(block_checksums(b"".join(pending)))
            pending, pending_bytes = [], 0
        whole = (piece.nbytes - start) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            out.append(block_checksums(piece[start : start + whole]))
        if start + whole < piece.nbytes:
            pending = [piece[start + whole :]]
            pending_bytes = pending[0].nbytes
    if pending_bytes:
        out.append(block_checksums(b"".join(pending)))
    return np.concatenate(out)


def _records(rows: PartRows) -> Any:
    """Arrow IPC file, uncompressed, one batch: seq, id, document, uri, metadata."""
    batch = pa.record_batch(
        [pa.array(rows.seqs), rows.ids, rows.documents, rows.uris, rows.metadatas],
        names=["seq", "id", "document", "uri", "metadata"],
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def squared_norms_of(vectors: Float32s) -> Float32s:
    """float32[n], of float32[n, d]: the section `norms`."""
    norms: Float32s = np.einsum("nd,nd->n", vectors, vectors)
    return norms
