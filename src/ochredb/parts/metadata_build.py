"""From JSON objects to the typed columns of the metadata index, a few thousand rows at a time.

Work is done per key on columns of Python values, in steps small enough that no single C call holds
the GIL for more than about a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ochredb.parts.columns import BytesColumn
from ochredb.parts.ids import IdIndex
from ochredb.parts.typed import KINDS, Dictionary, Kind, ListColumn, ScalarColumn, Values
from ochredb.types import METADATA_TYPES

_STEP_ROWS = 2_000
_STEP_BYTES = 1 << 17
_PENDING_MAX = 500
# A scalar present in at least one row in this many is kept dense.
_DENSE_ONE_IN = 8
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1

RowNumbers = NDArray[np.int32]


def build_columns(
    metadatas: BytesColumn | Sequence[bytes | None],
) -> dict[tuple[str, str], ScalarColumn | ListColumn]:
    """Columns by (key, type name) of n JSON objects.

    Nulls, nested objects and empty lists are as if absent. Integers beyond int64 become floats, as
    on the way in.
    """
    collectors: dict[tuple[str, str], _Collector] = {}
    # Values of keys that few rows have, until there are enough of a key to be worth a step.
    pending: dict[str, tuple[list[int], list[Any]]] = {}
    for first_row, objects in _parsed(metadatas):
        keys = dict.fromkeys(chain.from_iterable(objects))  # In order of appearance: reproducible.
        if len(keys) * len(objects) <= 2 * sum(map(len, objects)):
            rows = np.arange(first_row, first_row + len(objects), dtype=np.int32)
            for key in keys:
                _collect(collectors, key, rows, [item.get(key) for item in objects])
            continue
        for row, item in enumerate(objects, first_row):
            for key, value in item.items():
                key_rows, values = pending.setdefault(key, ([], []))
                key_rows.append(row)
                values.append(value)
        for key in keys:
            if len(pending[key][0]) >= _PENDING_MAX:
                _flush(collectors, key, *pending.pop(key))
    for key, columns in pending.items():
        _flush(collectors, key, *columns)
    count = len(metadatas)
    return {name: collector.finish(count) for name, collector in collectors.items()}


def _flush(
    collectors: dict[tuple[str, str], _Collector], key: str, rows: list[int], values: list[Any]
) -> None:
    _collect(collectors, key, np.array(rows, dtype=np.int32), values)


def _parsed(
    metadatas: BytesColumn | Sequence[bytes | None],
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The objects, in steps: the row of the first one, and the objects."""
    for start in range(0, len(metadatas), _STEP_ROWS):
        rows = range(start, min(start + _STEP_ROWS, len(metadatas)))
        found = (
            metadatas.take(rows)
            if isinstance(metadatas, BytesColumn)
            else metadatas[start : rows.stop]
        )
        texts = [text or b"{}" for text in found]
        # Long objects are parsed fewer at a time.
        pieces = 1 + sum(map(len, texts)) // _STEP_BYTES
        size = -(-len(texts) // pieces)
        for first in range(0, len(texts), size):
            joined = b",".join(texts[first : first + size])
            yield start + first, orjson.loads(b"[" + joined + b"]")


def _collect(
    collectors: dict[tuple[str, str], _Collector], key: str, rows: RowNumbers, values: list[Any]
) -> None:
    for type_, type_rows, type_values in _by_type(rows, values):
        if type_ is not list:
            _add(collectors, key, type_, type_rows, type_values, suffix="")
            continue
        lengths = np.fromiter(map(len, type_values), dtype=np.int64, count=len(type_values))
        elements = list(chain.from_iterable(type_values))
        for element_type, element_rows, group in _by_type(np.repeat(type_rows, lengths), elements):
            _add(collectors, key, element_type, element_rows, group, suffix="_list")


def _by_type(rows: RowNumbers, values: list[Any]) -> Iterator[tuple[type, RowNumbers, list[Any]]]:
    types = dict.fromkeys(map(type, values))
    if len(types) == 1:
        yield from ((type_, rows, values) for type_ in types)
        return
    for type_ in types:
        if type_ is not type(None):
            places = [place for place, value in enumerate(values) if type(value) is type_]
            yield type_, rows[places], [values[place] for place in places]


def _add(
    collectors: dict[tuple[str, str], _Collector],
    key: str,
    type_: type,
    rows: RowNumbers,
    values: list[Any],
    *,
    suffix: str,
) -> None:
    kind = KINDS.get(type_)
    if kind is None:  # null, or an object such as a sparse vector: not for this index.
        return
    if kind == "int" and not _INT64_MIN <= min(values) <= max(values) <= _INT64_MAX:
        huge = [not _INT64_MIN <= value <= _INT64_MAX for value in values]
        floats = [float(value) for value, big in zip(values, huge, strict=True) if big]
        _add(collectors, key, float, rows[np.array(huge)], floats, suffix=suffix)
        values = [value for value, big in zip(values, huge, strict=True) if not big]
        rows = rows[~np.array(huge)]
        if not values:
            return
    name = kind + suffix
    assert name in METADATA_TYPES
    collector = collectors.get((key, name))
    if collector is None:
        collector = collectors[key, name] = _Collector(kind, is_list=bool(suffix))
    collector.add(rows, values)


_DTYPES: dict[Kind, type] = {
    "string": np.uint32,
    "int": np.int64,
    "float": np.float64,
    "bool": np.bool_,
}


class _Collector:
    """Grows one column. Rows arrive nearly in ascending order, and once each in a scalar one."""

    def __init__(self, kind: Kind, *, is_list: bool) -> None:
        self._kind, self._is_list = kind, is_list
        self._rows: list[RowNumbers] = []
        self._values: list[NDArray[Any]] = []
        self._codes: dict[str, int] = {}

    def add(self, rows: RowNumbers, values: list[Any]) -> None:
        """One value per row, all of the column's kind."""
        if self._kind == "string":
            codes = self._codes
            for value in dict.fromkeys(values):
                codes.setdefault(value, len(codes))
            values = list(map(codes.__getitem__, values))
        self._rows.append(rows)
        self._values.append(np.array(values, dtype=_DTYPES[self._kind]))

    def finish(self, row_count: int) -> ScalarColumn | ListColumn:
        rows, array = np.concatenate(self._rows), np.concatenate(self._values)
        if self._kind == "float":
            array += 0.0  # -0.0 becomes 0.0: equal numbers have equal bits.
        array = _narrowed(self._kind, array)
        dictionary = _dictionary(list(self._codes)) if self._kind == "string" else None
        if self._is_list:
            order = np.argsort(array, kind="stable")
            return ListColumn(row_count, Values(self._kind, array[order], dictionary), rows[order])
        if len(rows) * _DENSE_ONE_IN < row_count:
            order = np.argsort(rows, kind="stable")
            values = Values(self._kind, array[order], dictionary)
            return ScalarColumn(row_count, values, rows=rows[order])
        dense = np.zeros(row_count, dtype=array.dtype)
        dense[rows] = array
        present = None
        if len(rows) < row_count:
            present = np.zeros(row_count, dtype=np.bool_)
            present[rows] = True
        return ScalarColumn(row_count, Values(self._kind, dense, dictionary), present=present)


def _dictionary(strings: list[str]) -> Dictionary:
    column = BytesColumn.from_list(strings)
    return Dictionary(column, IdIndex.build(column))


def _narrowed(kind: Kind, array: NDArray[Any]) -> NDArray[Any]:
    """The same integers in the smallest type that holds them all."""
    if kind not in ("int", "string"):
        return array
    low, high = int(array.min()), int(array.max())
    prefix = "i" if kind == "int" else "u"
    for size in (1, 2, 4):
        bounds = np.iinfo(np.dtype(f"{prefix}{size}"))
        if bounds.min <= low and high <= bounds.max:
            return array.astype(bounds.dtype)
    return array
