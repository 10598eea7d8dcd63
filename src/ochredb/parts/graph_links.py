"""What a part stores of its graph: everything but the vectors, which it has already.

Sections `graph/directory` and `graph/arrays` (docs/formats/graph.md). A node's number is its label.
hnswlib's own vectors are put together again from the part's, bit for bit: for cosine, which it
normalises, each label has the factor. The few that this does not give, those of dead records above
all, are stored.

An index goes in and out as hnswlib's pickled state: arrays take a fraction of the time that its
files do. It holds the interpreter's lock for one copy of the nodes; all else here does without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import hnswlib
import numpy as np
from numpy.typing import NDArray

from ochredb.configuration import Space
from ochredb.errors import Corrupt, Unavailable
from ochredb.parts.arrays import (
    ArrayReader,
    ArrayWriter,
    Section,
    SectionSource,
    directory_count,
    read_directory,
    write_directory,
)
from ochredb.types import Float32s

FORMAT = 2  # 1 was a section `graph` with hnswlib's own file.

_NAME = "graph"
_SEED = 100
_BLOCK_ROWS = 4_096
_SPACES = ("l2", "cosine", "ip")

UInt8s = NDArray[np.uint8]
UInt32s = NDArray[np.uint32]
LabelRows = NDArray[np.int32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLinks:
    """A graph of m labels without its vectors. M is `max_neighbors`.

    entry: the label that every search begins with. levels: uint8[m], the highest of each.
    links: uint32[m, 1 + 2·M], of level 0: a count, so many labels, zeros.
    upper_links: uint32[u, 1 + M], the same for levels 1, 2, … of each label that has them.
    factors: float32[m], a vector times its factor is what hnswlib has of it; None: the vector is.
    kept: uint32[x], ascending, labels whose vectors are float32[x, d] `kept_vectors`.
    """

    space: Space
    dimension: int
    max_neighbors: int
    ef_construction: int
    entry: int
    levels: UInt8s
    links: UInt32s
    upper_links: UInt32s
    factors: Float32s | None
    kept: UInt32s
    kept_vectors: Float32s

    def __len__(self) -> int:
        return len(self.levels)

    # -- from and to hnswlib

    @classmethod
    def of(cls, index: hnswlib.Index, vectors: Float32s, rows: LabelRows) -> GraphLinks:
        """What is worth storing of an index that nobody inserts into.

        vectors: float32[n, d], the part's. rows: int32[m], the row of each label, -1 = dead; None:
            labels are rows.
        Cost: 0.1 s for 100k x 128, of which 25 ms with the interpreter's lock. Memory: a copy of
            the index.
        """
        node = _node(index.dim, index.M)
        # MemoryError comes from here: hnswlib does not look whether it was given the memory.
        np.empty(2 * index.get_current_count() * node.itemsize, np.uint8)
        (state,) = index.__getstate__()
        nodes = state["data_level0"].view(node)
        labels = nodes["label"].astype(np.uint32)
        assert labels.max() < len(labels), "labels are numbers in order of insertion"
        order = np.argsort(labels)  # The node of each label: threads insert in any order.
        levels = state["element_levels"][: len(labels)]
        owners = labels[np.repeat(np.arange(len(labels)), levels)]
        upper = state["link_lists"].view(np.uint32).reshape(-1, 1 + index.M)
        factors, kept, kept_vectors = _vectors_of(index.space, nodes, order, vectors, rows)
        return cls(
            space=index.space,
            dimension=index.dim,
            max_neighbors=index.M,
            ef_construction=index.ef_construction,
            entry=int(labels[state["enterpoint_node"]]),
            levels=levels[order].astype(np.uint8),
            links=_relabelled(nodes["links"], order, labels),
            upper_links=_relabelled(upper, np.argsort(owners, kind="stable"), labels),
            factors=factors,
            kept=kept,
            kept_vectors=kept_vectors,
        )

    def widened(self, max_neighbors: int) -> GraphLinks:
        """The same links, with room for more; what is inserted next uses it, on both sides."""
        if max_neighbors <= self.max_neighbors:
            return self

        def padded(links: UInt32s, width: int) -> UInt32s:
            out = np.zeros((len(links), width), np.uint32)
            out[:, : links.shape[1]] = links
            return out

        return replace(
            self,
            max_neighbors=max_neighbors,
            links=padded(self.links, 1 + 2 * max_neighbors),
            upper_links=padded(self.upper_links, 1 + max_neighbors),
        )

    def nodes(self, vectors: Float32s, rows: LabelRows) -> NDArray[Any]:
        """The nodes as hnswlib has them in memory, structures[m], for `index`.

        vectors, rows: as above, of the part. Raises Corrupt if a label has no vector.
        Cost: 10 ms for 100k x 128.
        """
        self._check_rows(len(vectors), rows)
        nodes = np.empty(len(self), _node(self.dimension, self.max_neighbors))
        nodes["links"] = self.links
        nodes["label"] = np.arange(len(self))
        with np.errstate(all="ignore"):  # Rows that stand for dead labels are replaced below.
            for block in _blocks(len(self)):
                found = vectors[block if rows is None else rows[block]]
                if self.factors is None:
                    nodes["vector"][block] = found
                else:
                    np.multiply(found, self.factors[block, None], out=nodes["vector"][block])
        nodes["vector"][self.kept] = self.kept_vectors
        return nodes

    def index(self, nodes: NDArray[Any], *, room: int = 0) -> hnswlib.Index:
        """An index of the caller's own that searches exactly as the one this was taken of.

        room: for so many more labels. Cost: 25 ms for 100k x 128, with the interpreter's lock.
        """
        count = len(self)
        index = hnswlib.Index(space=self.space, dim=self.dimension)
        index.init_index(max_elements=1, M=self.max_neighbors, ef_construction=self.ef_construction)
        (state,) = index.__getstate__()  # Its sizes and constants are right for us.
        # hnswlib looks labels up only to find out that new ones are new, so one entry will do:
        # a table of all of them is as slow to fill as all else together.
        state |= {
            "label_lookup_external": np.zeros(count, np.uint64),
            "label_lookup_internal": np.zeros(count, np.uint32),
            "seed": _SEED + count,  # Of the levels of what is inserted: not the same each time.
            "max_elements": count + room,
            "cur_element_count": count,
            "enterpoint_node": self.entry,
            "max_level": int(self.levels[self.entry]),
            "ep_added": True,  # Else the next insertion would hold the interpreter's lock.
            "element_levels": self.levels.astype(np.int32),
            "data_level0": nodes.view(np.int8),
            "link_lists": self.upper_links.ravel().view(np.int8),
        }
        try:
            return hnswlib.Index(params=state)
        except RuntimeError as error:  # "Not enough memory", by all that it checks.
            raise Unavailable(f"cannot take a graph into memory: {error}") from error

    def _check_rows(self, count: int, rows: LabelRows) -> None:
        """Raises Corrupt unless every label has a vector, its row's or its own."""
        if rows is None:
            right = len(self) == count
        else:
            dead = rows < 0
            dead[self.kept] = False
            right = len(rows) == len(self) and not dead.any() and int(rows.max()) < count
        if not right:
            raise Corrupt(f"{_NAME}: not every label has a vector")

    # -- from and to bytes

    def sections(self) -> dict[str, Section]:
        arrays = ArrayWriter()
        directory = {
            "format": FORMAT,
            "space": self.space,
            "dimension": self.dimension,
            "max_neighbors": self.max_neighbors,
            "ef_construction": self.ef_construction,
            "labels": len(self),
            "entry": self.entry,
            "levels": arrays.add(self.levels),
            "links": arrays.add(self.links.ravel()),
            "upper_links": arrays.add(self.upper_links.ravel()),
            "factors": None if self.factors is None else arrays.add(self.factors),
            "kept": arrays.add(self.kept),
            "kept_vectors": arrays.add(self.kept_vectors.ravel()),
        }
        return {f"{_NAME}/directory": write_directory(directory), f"{_NAME}/arrays": arrays.data()}

    @classmethod
    def open(cls, section: SectionSource) -> GraphLinks:
        """Read back what `sections` gave, without copying.

        Raises Corrupt for whatever would lead hnswlib out of its memory. Cost: 5 ms for 100k.
        """
        directory = read_directory(section, f"{_NAME}/directory", FORMAT)
        labels, dimension, max_neighbors, ef_construction, entry = (
            directory_count(directory, key, _NAME)
            for key in ("labels", "dimension", "max_neighbors", "ef_construction", "entry")
        )
        space = directory.get("space")
        if space not in _SPACES or entry >= labels or not dimension or not max_neighbors:
            raise Corrupt(f"{_NAME}: the directory describes no graph")
        reader = ArrayReader(section(f"{_NAME}/arrays"), _NAME)

        def array(key: str, dtype: str, count: int | None = None, width: int = 1) -> NDArray[Any]:
            """items[count] or items[count, width] of which at least the size is right."""
            ref = directory.get(key)
            reader.check(ref, dtype, count=None if count is None else count * width)
            found = reader.get(ref)
            if len(found) % width:
                raise Corrupt(f"{_NAME}: {key} has {len(found)} items")
            return found if width == 1 else found.reshape(-1, width)

        kept = array("kept", "<u4")
        links = cls(
            space=space,
            dimension=dimension,
            max_neighbors=max_neighbors,
            ef_construction=ef_construction,
            entry=entry,
            levels=array("levels", "|u1", labels),
            links=array("links", "<u4", labels, 1 + 2 * max_neighbors),
            upper_links=array("upper_links", "<u4", None, 1 + max_neighbors),
            factors=array("factors", "<f4", labels) if space == "cosine" else None,
            kept=kept,
            kept_vectors=array("kept_vectors", "<f4", len(kept), dimension).reshape(-1, dimension),
        )
        links._check()
        return links

    def _check(self) -> None:
        """Raises Corrupt unless every link leads to a label that has the link's level."""
        labels = len(self)
        levels = self.levels.astype(np.int64)
        right = (
            int(levels.sum()) == len(self.upper_links)
            and int(levels.max()) == int(levels[self.entry])
            and (not len(self.kept) or int(self.kept.max()) < labels)
        )
        for links in (self.links, self.upper_links):
            if len(links):
                right = right and int(links[:, 0].max()) < links.shape[1]
                right = right and int(links[:, 1:].max()) < labels
        if right:
            owners = np.repeat(np.arange(labels), levels)
            firsts = np.cumsum(levels) - levels
            level = 1 + np.arange(len(owners)) - firsts[owners]
            used = np.arange(self.max_neighbors) < self.upper_links[:, :1]
            right = bool((~used | (levels[self.upper_links[:, 1:]] >= level[:, None])).all())
        if not right:
            raise Corrupt(f"{_NAME}: links lead out of the graph")


def _node(dimension: int, max_neighbors: int) -> np.dtype[Any]:
    """A node of level 0 as it lies in hnswlib's memory."""
    return np.dtype(
        [
            ("links", "<u4", (1 + 2 * max_neighbors,)),
            ("vector", "<f4", (dimension,)),
            ("label", "<u8"),
        ]
    )


def _blocks(count: int) -> Iterator[slice]:
    """Ranges of labels: memory is bounded, and other threads get their turns."""
    return (slice(i, min(i + _BLOCK_ROWS, count)) for i in range(0, count, _BLOCK_ROWS))


def _relabelled(links: UInt32s, order: NDArray[np.int64], labels: UInt32s) -> UInt32s:
    """links[order], the nodes in it replaced by their labels, what is not used by zero."""
    out = np.empty(links.shape, np.uint32)
    places = np.arange(links.shape[1] - 1)
    for block in _blocks(len(links)):
        found = links[order[block]]
        used = places < found[:, :1]
        out[block, 0] = found[:, 0]
        # hnswlib leaves numbers of former neighbours behind those in use.
        out[block, 1:] = np.where(used, labels[np.where(used, found[:, 1:], 0)], 0)
    return out


def _vectors_of(
    space: Space,
    nodes: NDArray[Any],
    order: NDArray[np.int64],
    vectors: Float32s,
    rows: LabelRows,
) -> tuple[Float32s | None, UInt32s, Float32s]:
    """`factors`, `kept` and `kept_vectors` with which the vectors in `nodes` can be rebuilt."""
    factors = np.ones(len(order), np.float32) if space == "cosine" else None
    kept, kept_vectors = [], []
    with np.errstate(all="ignore"):
        for block in _blocks(len(order)):
            wanted = nodes["vector"][order[block]]
            places = block if rows is None else rows[block]
            rebuilt = vectors[places]
            if factors is not None:
                factors[block] = _factors(rebuilt, wanted)
                rebuilt = rebuilt * factors[block, None]
            wrong = ~_equal(rebuilt, wanted)
            if rows is not None:
                wrong |= rows[block] < 0
            kept.append((np.flatnonzero(wrong) + block.start).astype(np.uint32))
            kept_vectors.append(wanted[wrong])
    return factors, np.concatenate(kept), np.concatenate(kept_vectors)


def _factors(vectors: Float32s, wanted: Float32s) -> Float32s:
    """float32[b] such that vectors * factors are `wanted`, bit by bit; any number if there is none.

    hnswlib multiplies with one float32, whose last bits depend on its compiler. The quotient of the
    largest components is at most two steps away from it.
    """
    largest = np.argmax(np.abs(vectors), axis=1)[:, None]
    quotients = np.take_along_axis(wanted, largest, 1).astype(np.float64)
    quotients /= np.take_along_axis(vectors, largest, 1)
    factors = np.nan_to_num(quotients[:, 0], nan=1.0).astype(np.float32)
    left = np.arange(len(factors))
    first = factors.view(np.int32).copy()
    for steps in (0, 1, -1, 2, -2):
        tried = (first[left] + np.int32(steps)).view(np.float32)
        found = _equal(vectors[left] * tried[:, None], wanted[left])
        factors[left[found]] = tried[found]
        left = left[~found]
        if not len(left):
            break
    return factors


def _equal(one: Float32s, other: Float32s) -> NDArray[np.bool_]:
    """bool[b]: which rows are the same bits."""
    same: NDArray[np.bool_] = (one.view(np.uint32) == other.view(np.uint32)).all(axis=1)
    return same
