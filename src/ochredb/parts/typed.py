"""Typed columns of one metadata key, and exact comparison of their values with a JSON scalar.

The values of a key are kept per type: `int`, `float`, `bool` or `string`. A `Values` is an array of
such values; a `ScalarColumn` says which row holds each of them, a `ListColumn` which rows have a
list that holds it. Comparison is exact: an int64 is never rounded to a float64 or the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ochredb.metadata import INT64_MAX, INT64_MIN
from ochredb.parts.columns import BytesColumn
from ochredb.parts.ids import IdIndex
from ochredb.types import Bools, Int64s
from ochredb.where import Scalar

Kind = Literal["string", "int", "float", "bool"]
Order = Literal["$eq", "$gt", "$gte", "$lt", "$lte"]

# Up to this many values, one comparison each beats a table.
_LOOP_MAX = 8
# The widest range of integers for which a table has a place for each: 256 KiB, level 2 cache.
_RANGE_MAX = 1 << 18
# Bits of a hash table's size, and more of them where there are many values.
_SLOT_BITS_MIN, _SLOT_BITS_MAX = 12, 16
# The more collide, the more rounds; this many tables at most.
_ROUNDS_MAX = 3
# Items looked up per step: the temporaries stay in the level 2 cache.
_STEP_ITEMS = 1 << 14
# Hits of a sparse column are written one by one up to this share, and above it with the others.
_SCATTER_ONE_IN = 2
# By item size: odd numbers near a power of two divided by the golden ratio, and its odd powers.
_MULTIPLIERS: dict[int, list[Any]] = {
    4: [np.uint32(pow(0x9E3779B1, power, 1 << 32)) for power in range(1, 16, 2)],
    8: [np.uint64(pow(0x9E3779B97F4A7C15, power, 1 << 64)) for power in range(1, 16, 2)],
}
_TRIED_MAX = 256  # More values than this collide anyway: the first multiplier is as good as any.


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Distinct strings, numbered; `index` finds the number ("code") of one."""

    strings: BytesColumn
    index: IdIndex

    def codes(self, values: Sequence[str]) -> Int64s:
        """int64[m]: the codes of those of `values` that occur."""
        codes = self.index.lookup(values, self.strings)
        return codes[codes >= 0]


@dataclass(frozen=True, slots=True)
class Values:
    """Values of one kind.

    kind "int": int8 to int64; "float": float64 without NaN; "bool": bool; "string": uint8 to uint32
    codes in `dictionary`.
    """

    kind: Kind
    array: NDArray[Any]
    dictionary: Dictionary | None = None

    def __len__(self) -> int:
        return len(self.array)

    def compare(self, op: Order, value: Scalar) -> Bools | None:
        """bool[len]: which values stand in this relation to `value`; None if none does.

        A value of another kind stands in none, but ints and floats are one kind here.
        """
        if self.kind in ("int", "float"):
            if isinstance(value, bool | str):
                return None
            compare = _compare_ints if self.kind == "int" else _compare_floats
            return compare(self.array, op, value)
        target = self.target(value)
        if op != "$eq" or target is None:
            return None
        equal: Bools = self.array == target
        return equal

    def one_of(self, values: Sequence[Scalar]) -> Bools | None:
        """bool[len]: which values equal one of `values`; None if none does."""
        targets = self.targets(values)
        return _one_of(self.array, targets) if len(targets) else None

    def target(self, value: Scalar) -> Any | None:
        """What an equal value is in `array`, as a numpy scalar; None if it cannot occur there."""
        targets = self.targets([value])
        return targets[0] if len(targets) else None

    def targets(self, values: Sequence[Scalar]) -> NDArray[Any]:
        """What equals one of `values`, as it is in `array`; what cannot occur there drops out."""
        dtype = self.array.dtype
        types = set(map(type, values))
        if self.kind == "bool":
            return np.array([value for value in values if type(value) is bool], dtype=dtype)
        if self.kind == "float":
            if types == {float}:
                return np.array(values, dtype=dtype)
            exact = [_as_float(value) for value in values]
            return np.array([item for item in exact if item is not None], dtype=dtype)
        if self.kind == "string":
            assert self.dictionary is not None
            whole = self.dictionary.codes([value for value in values if type(value) is str])
        else:
            ints = cast("Sequence[int]", values) if types == {int} else _whole(values)
            if min(ints, default=0) < INT64_MIN or max(ints, default=0) > INT64_MAX:
                ints = [item for item in ints if INT64_MIN <= item <= INT64_MAX]
            whole = np.array(ints, dtype=np.int64)
        bounds = np.iinfo(dtype)
        return whole[(whole >= bounds.min) & (whole <= bounds.max)].astype(dtype)


@dataclass(frozen=True, slots=True)
class ScalarColumn:
    """At most one value per row of `row_count`.

    Dense: values.array[row], counted where `present[row]` (None: everywhere).
    Sparse: values.array[i] belongs to row `rows[i]`, int32, ascending.
    """

    row_count: int
    values: Values
    present: Bools | None = None
    rows: NDArray[np.int32] | None = None

    def spread(self, hits: Bools | None) -> Bools:
        """bool[row_count]: rows whose value is among `hits` (a new array)."""
        if hits is None:
            return np.zeros(self.row_count, dtype=np.bool_)
        if self.rows is not None:
            mask = np.zeros(self.row_count, dtype=np.bool_)
            if np.count_nonzero(hits) * _SCATTER_ONE_IN < len(hits):
                mask[self.rows.take(np.flatnonzero(hits))] = True
            else:
                mask[self.rows] = hits
            return mask
        return hits if self.present is None else np.logical_and(hits, self.present, out=hits)


@dataclass(frozen=True, slots=True)
class ListColumn:
    """The elements of list values, in ascending order, and the row (int32) of each."""

    row_count: int
    values: Values
    rows: NDArray[np.int32]

    def contains(self, value: Scalar) -> Bools:
        """bool[row_count]: rows whose list holds `value`, of the same type (1.0 is not 1)."""
        mask = np.zeros(self.row_count, dtype=np.bool_)
        if KINDS[type(value)] != self.values.kind:
            return mask
        target = self.values.target(value)
        if target is not None:
            first = int(np.searchsorted(self.values.array, target, side="left"))
            last = int(np.searchsorted(self.values.array, target, side="right"))
            mask[self.rows[first:last]] = True
        return mask


KINDS: dict[type, Kind] = {str: "string", bool: "bool", int: "int", float: "float"}


def _whole(values: Sequence[Scalar]) -> list[int]:
    """The ints equal to those of `values` that are whole numbers."""
    return [
        int(value)
        for value in values
        if type(value) is int or (type(value) is float and value.is_integer())
    ]


def _as_float(value: Scalar) -> float | None:
    """The float64 equal to a number, if there is one."""
    if isinstance(value, bool | str):
        return None
    nearest = _nearest_float(value)
    return nearest if nearest == value else None


def _nearest_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # An int beyond the floats lies between the largest one and infinity.
        return math.inf if value > 0 else -math.inf


def _compare_ints(array: NDArray[Any], op: Order, value: int | float) -> Bools | None:
    """Turn the relation into a closed range of ints, which is exact for any number."""
    bounds = np.iinfo(array.dtype)
    low, high = int(bounds.min), int(bounds.max)
    if isinstance(value, float) and not math.isfinite(value):
        if op == "$eq" or math.isnan(value) or (op in ("$gt", "$gte")) == (value > 0):
            return None
        return np.ones(len(array), dtype=np.bool_)
    floor, ceiling = math.floor(value), math.ceil(value)
    match op:
        case "$eq":
            low, high = max(low, ceiling), min(high, floor)
        case "$gt":
            low = max(low, floor + 1)
        case "$gte":
            low = max(low, ceiling)
        case "$lt":
            high = min(high, ceiling - 1)
        case "$lte":
            high = min(high, floor)
    if low > high:
        return None
    # Each bound is in the array's range now, so nothing is converted while comparing.
    key = array.dtype.type
    mask: Bools
    if low == high:
        mask = array == key(low)
    elif high == bounds.max:
        mask = array >= key(low)
    else:
        mask = array <= key(high)
    return mask


def _compare_floats(array: NDArray[np.float64], op: Order, value: int | float) -> Bools | None:
    """Compare with the nearest float; if it is not equal to `value`, no float lies between them."""
    if value != value:
        return None
    nearest = _nearest_float(value)
    if nearest == value:
        compare = {
            "$eq": np.equal, "$gt": np.greater, "$gte": np.greater_equal,
            "$lt": np.less, "$lte": np.less_equal,
        }[op]  # fmt: skip
    elif op == "$eq":
        return None
    elif op in ("$gt", "$gte"):
        compare = np.greater_equal if nearest > value else np.greater
    else:
        compare = np.less if nearest > value else np.less_equal
    mask: Bools = compare(array, nearest)
    return mask


def _one_of(array: NDArray[Any], wanted: NDArray[Any]) -> Bools:
    """bool[len]: which items equal one of `wanted`, at least one, of the array's type."""
    if len(wanted) > _LOOP_MAX:
        # Equal numbers have equal bits: adding 0 turns -0.0 into 0.0.
        wanted = np.unique(wanted if wanted.dtype == np.bool_ else wanted + wanted.dtype.type(0))
    if len(wanted) <= _LOOP_MAX:
        return _loop(array, wanted)
    if array.dtype.itemsize <= 2:
        table = np.zeros(1 << 8 * array.dtype.itemsize, dtype=np.bool_)
        table[_unsigned(wanted)] = True
        return table.take(_unsigned(array), mode="clip")  # In range anyway: "clip" is quicker.
    if array.dtype.kind == "u" and int(wanted[-1]) < _RANGE_MAX:  # Codes: a place for each.
        table = np.zeros(int(wanted[-1]) + 2, dtype=np.bool_)
        table[wanted] = True
        return table.take(array, mode="clip")
    if array.dtype.kind != "f" and int(wanted[-1]) - int(wanted[0]) < _RANGE_MAX:
        return _in_range_table(_unsigned(array), _unsigned(wanted))
    return _in_slots(_unsigned(array), _unsigned(wanted))


def _loop(array: NDArray[Any], keys: NDArray[Any]) -> Bools:
    """bool[len]: which items equal one of `keys` (at least one), by comparing with each."""
    mask: Bools = array == keys[0]
    equal = np.empty_like(mask)
    for key in keys[1:]:
        np.equal(array, key, out=equal)
        mask |= equal
    return mask


def _in_range_table(words: NDArray[Any], wanted: NDArray[Any]) -> Bools:
    """bool[len]: which words are among `wanted`, ascending as signed numbers and close together.

    words, wanted: uint32 or uint64. One table entry per number of the range, and one on either
    side: whatever lies outside of the range is clipped to these.
    """
    below = wanted[0] - words.dtype.type(1) if wanted[0] else ~words.dtype.type(0)
    places = (wanted - below).astype(np.int64)
    table = np.zeros(int(places[-1]) + 2, dtype=np.bool_)
    table[places] = True
    mask = np.empty(len(words), dtype=np.bool_)
    for start in range(0, len(words), _STEP_ITEMS):
        # Modular: what lies below the range becomes a huge number.
        relative = words[start : start + _STEP_ITEMS] - below
        mask[start : start + _STEP_ITEMS] = table.take(_index(relative), mode="clip")
    return mask


def _in_slots(words: NDArray[Any], wanted: NDArray[Any]) -> Bools:
    """bool[len]: which words (uint32 or uint64) are among `wanted`, all distinct.

    A hash table holds one wanted word per slot; each word is compared with the one in its slot. The
    few that found their slot taken get another round. Cost is the same whatever matches.
    """
    bits = min(max(_SLOT_BITS_MIN, 6 + len(wanted).bit_length()), _SLOT_BITS_MAX)
    shift = words.dtype.type(8 * words.dtype.itemsize - bits)
    # Few values have a place of their own each, for one multiplier or another.
    for multiplier in _MULTIPLIERS[words.dtype.itemsize]:
        table, rest = _table_of(wanted, wanted * multiplier >> shift, bits)
        if not len(rest) or len(wanted) > _TRIED_MAX:
            break
    tables = [table]
    while len(rest) > _LOOP_MAX and len(tables) < _ROUNDS_MAX:
        table, rest = _table_of(rest, rest * multiplier >> shift, bits)
        tables.append(table)
    rest = np.sort(rest)
    mask = np.empty(len(words), dtype=np.bool_)
    for start in range(0, len(words), _STEP_ITEMS):
        step, hits = words[start : start + _STEP_ITEMS], mask[start : start + _STEP_ITEMS]
        mixed = step * multiplier
        mixed >>= shift
        index = _index(mixed)
        np.equal(tables[0].take(index, mode="clip"), step, out=hits)
        for table in tables[1:]:
            hits |= table.take(index, mode="clip") == step
        if 0 < len(rest) <= _LOOP_MAX:
            hits |= _loop(step, rest)
        elif len(rest):  # Someone has chosen values that collide.
            places = np.minimum(np.searchsorted(rest, step), len(rest) - 1)
            hits |= rest[places] == step
    return mask


def _table_of(
    wanted: NDArray[Any], slots: NDArray[Any], bits: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The table with a wanted word in its slot, and those that found theirs taken."""
    # An empty slot holds a word that belongs elsewhere, which no word in this slot equals.
    table = np.full(1 << bits, wanted[0])
    table[slots] = wanted
    return table, wanted[table[slots] != wanted]


def _index(words: NDArray[Any]) -> NDArray[Any]:
    """The same numbers, to index with. 8-byte ones as int64 in place: huge ones are negative."""
    return words.view(np.int64) if words.dtype.itemsize == 8 else words


def _unsigned(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")
