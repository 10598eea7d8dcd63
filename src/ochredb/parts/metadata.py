"""The metadata index: for each key and type a typed column, answering a predicate with a mask.

A key's values may have several types in different rows; each type has its own column. Scalars that
an eighth of the rows or more have are dense, others sparse; strings are dictionary-coded; the
elements of lists are sorted, so that `$contains` is a binary search. Predicates here are the
positive forms: what is absent never matches; the filter evaluator complements for `$ne`, `$nin` and
`$not_contains`.
Format: the page `metadata-index` in docs/formats.

    index = MetadataIndex.build([b'{"year":1999}', None])
    index.compare("year", "$gt", 1990)   # array([True, False])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ochredb.errors import Corrupt
from ochredb.parts.arrays import (
    ArrayReader,
    ArrayWriter,
    Section,
    SectionSource,
    directory_count,
    read_directory,
    write_directory,
)
from ochredb.parts.columns import BytesColumn
from ochredb.parts.ids import IdIndex
from ochredb.parts.metadata_build import build_columns
from ochredb.parts.typed import KINDS, Dictionary, Kind, ListColumn, Order, ScalarColumn, Values
from ochredb.types import Bools
from ochredb.where import Scalar

FORMAT = 1

_DTYPES: dict[Kind, tuple[str, ...]] = {
    "string": ("|u1", "<u2", "<u4"),
    "int": ("|i1", "<i2", "<i4", "<i8"),
    "float": ("<f8",),
    "bool": ("|b1",),
}
Column = ScalarColumn | ListColumn


class MetadataIndex:
    """Predicates over the metadata of n rows. Reading one key touches that key's columns only."""

    def __init__(
        self,
        row_count: int,
        columns: dict[tuple[str, str], Column],
        stored: dict[tuple[str, str], dict[str, Any]] | None = None,
        arrays: ArrayReader | None = None,
    ) -> None:
        """columns: by key and type name; `stored` columns join them when they are first used."""
        self._row_count = row_count
        self._columns = columns
        self._stored = stored or {}
        self._arrays = arrays

    @classmethod
    def build(cls, metadatas: BytesColumn | Sequence[bytes | None]) -> MetadataIndex:
        """From n JSON objects (None: no metadata). Cost: about 2 µs per row of three keys."""
        return cls(len(metadatas), build_columns(metadatas))

    def __len__(self) -> int:
        return self._row_count

    @property
    def key_types(self) -> frozenset[tuple[str, str]]:
        """The (key, type) pairs that occur; types as in `METADATA_TYPES`."""
        return frozenset(self._columns) | frozenset(self._stored)

    def compare(self, key: str, op: Order, value: Scalar) -> Bools:
        """bool[n]: rows whose scalar stands in this relation to `value`."""
        masks = [
            column.spread(column.values.compare(op, value))
            for column in self._scalars(key, KINDS[type(value)])
        ]
        return self._any(masks)

    def one_of(self, key: str, values: Sequence[Scalar]) -> Bools:
        """bool[n]: rows whose scalar equals one of `values`."""
        kinds = dict.fromkeys(KINDS[type(value)] for value in values)
        masks = [
            column.spread(column.values.one_of(values))
            for kind in kinds
            for column in self._scalars(key, kind)
        ]
        return self._any(masks)

    def list_contains(self, key: str, value: Scalar) -> Bools:
        """bool[n]: rows whose list holds `value`, in exactly this type."""
        column = self._column(key, f"{KINDS[type(value)]}_list")
        if not isinstance(column, ListColumn):
            return np.zeros(self._row_count, dtype=np.bool_)
        return column.contains(value)

    def _scalars(self, key: str, kind: Kind) -> list[ScalarColumn]:
        """The columns that may hold a value equal or comparable to one of this kind."""
        kinds: tuple[Kind, ...] = ("int", "float") if kind in ("int", "float") else (kind,)
        columns = [self._column(key, name) for name in kinds]
        return [column for column in columns if isinstance(column, ScalarColumn)]

    def _any(self, masks: list[Bools]) -> Bools:
        if not masks:
            return np.zeros(self._row_count, dtype=np.bool_)
        result = masks[0]
        for mask in masks[1:]:
            result |= mask
        return result

    def _column(self, key: str, type_name: str) -> Column | None:
        column = self._columns.get((key, type_name))
        if column is None:
            entry = self._stored.get((key, type_name))
            if entry is None:
                return None
            assert self._arrays is not None
            column = _load(entry, self._row_count, self._arrays)
            self._columns[key, type_name] = column
        return column

    def sections(self, name: str = "metadata") -> dict[str, Section]:
        """The index as sections of a part, for `open`."""
        arrays = ArrayWriter()
        entries = []
        for key, type_name in sorted(self.key_types):
            column = self._column(key, type_name)
            assert column is not None
            entries.append({"key": key, "type": type_name, **_store(column, arrays)})
        directory = {"format": FORMAT, "count": self._row_count, "columns": entries}
        return {f"{name}/directory": write_directory(directory), f"{name}/arrays": arrays.data()}

    @classmethod
    def open(cls, section: SectionSource, name: str = "metadata") -> MetadataIndex:
        """Read back what `sections` gave, without copying. Raises Corrupt."""
        directory = read_directory(section, f"{name}/directory", FORMAT)
        row_count = directory_count(directory, "count", name)
        arrays = ArrayReader(section(f"{name}/arrays"), name)
        entries = directory.get("columns")
        if not isinstance(entries, list):
            raise Corrupt(f"{name}: the directory has no columns")
        stored = {}
        for entry in entries:
            _check(entry, row_count, arrays, name)
            stored[entry["key"], entry["type"]] = entry
        return cls(row_count, {}, stored, arrays)


def _store(column: Column, arrays: ArrayWriter) -> dict[str, Any]:
    entry: dict[str, Any] = {"values": arrays.add(column.values.array)}
    if column.rows is not None:
        entry["rows"] = arrays.add(column.rows)
    if isinstance(column, ScalarColumn) and column.present is not None:
        entry["present"] = arrays.add(column.present)
    if column.values.dictionary is not None:
        strings = column.values.dictionary.strings
        entry["offsets"] = arrays.add(strings.offsets)
        entry["strings"] = arrays.add(strings.data)
        entry["hashes"] = arrays.add(column.values.dictionary.index.hashes)
        entry["codes"] = arrays.add(column.values.dictionary.index.rows)
    return entry


def _check(entry: Any, row_count: int, arrays: ArrayReader, name: str) -> None:
    """Raises Corrupt unless the directory entry of a column is sound (arrays are not looked at)."""
    match entry:
        case {"key": str(), "type": str(type_name), "values": values}:
            kind = type_name.removesuffix("_list")
        case _:
            raise Corrupt(f"{name}: bad column: {entry!r}")
    if kind not in _DTYPES:
        raise Corrupt(f"{name}: unknown type {type_name!r}")
    dense = "rows" not in entry
    if dense and kind != type_name:
        raise Corrupt(f"{name}: a list column without rows")
    arrays.check(values, *_DTYPES[kind], count=row_count if dense else None)
    if not dense:
        arrays.check(entry["rows"], "<i4", count=values[2])
    elif "present" in entry:
        arrays.check(entry["present"], "|b1", count=row_count)
    if kind == "string":
        arrays.check(entry.get("codes"), "<u4")
        count = entry["codes"][2]
        arrays.check(entry.get("hashes"), "<u8", count=count)
        arrays.check(entry.get("offsets"), "<i8", count=count + 1)
        arrays.check(entry.get("strings"), "|u1")


def _load(entry: dict[str, Any], row_count: int, arrays: ArrayReader) -> Column:
    """The column of a checked entry. Raises Corrupt if numbers in its arrays point outside."""
    kind = entry["type"].removesuffix("_list")
    dictionary = None
    array = arrays.get(entry["values"])
    if kind == "string":
        strings = BytesColumn(arrays.get(entry["offsets"]), arrays.get(entry["strings"]))
        index = IdIndex(arrays.get(entry["hashes"]), arrays.get(entry["codes"]))
        index.check(len(strings))
        dictionary = Dictionary(strings, index)
    values = Values(kind, array, dictionary)
    present = arrays.get(entry["present"]) if "present" in entry else None
    if "rows" not in entry:
        return ScalarColumn(row_count, values, present=present)
    rows = arrays.get(entry["rows"])
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < row_count:
        raise Corrupt(f"metadata key {entry['key']!r}: a row number is out of range")
    if entry["type"] == kind:
        return ScalarColumn(row_count, values, rows=rows)
    return ListColumn(row_count, values, rows)
