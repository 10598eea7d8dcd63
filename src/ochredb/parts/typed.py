"""Typed columns of one metadata key, and exact comparison of their values with a JSON scalar.

The values of a key are kept per type: `int`, `float`, `bool` or `string`. A `Values` is an array of
such values; a `ScalarColumn` says which row holds each of them, a `ListColumn` which rows have a
list that holds it. Comparison is exact: an int64 is never rounded to a float64 or the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ochredb.parts.columns import BytesColumn
from ochredb.parts.ids import IdIndex
from ochredb.types import Bools
from ochredb.where import Scalar

Kind = Literal["string", "int", "float", "bool"]
Order = Literal["$eq", "$gt", "$gte", "$lt", "$lte"]

# Up to this many values, one comparison each beats a table.
_LOOP_MAX = 4
# By item size: a power of two divided by the golden ratio, and the shift that leaves 16 bits.
_HASHES = {
    4: (np.uint32(0x9E3779B1), np.uint32(16)),
    8: (np.uint64(0x9E3779B97F4A7C15), np.uint64(48)),
}


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Distinct strings, numbered; `index` finds the number ("code") of one."""

    strings: BytesColumn
    index: IdIndex

    def codes(self, values: Sequence[str]) -> list[int]:
        """The codes of those of `values` that occur."""
        return [code for code in self.index.lookup(values, self.strings).tolist() if code >= 0]


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
        equal: Bools = self.array == self.array.dtype.type(target)
        return equal

    def one_of(self, values: Sequence[Scalar]) -> Bools | None:
        """bool[len]: which values equal one of `values`; None if none does."""
        targets = self.targets(values)
        return _one_of(self.array, targets) if targets else None

    def target(self, value: Scalar) -> int | float | bool | None:
        """What an equal value is in `array`, or None if it cannot occur there."""
        targets = self.targets([value])
        return targets[0] if targets else None

    def targets(self, values: Sequence[Scalar]) -> list[int] | list[float] | list[bool]:
        """What equals one of `values`, as it is in `array`; what cannot occur there drops out."""
        if self.kind == "bool":
            return [value for value in values if type(value) is bool]
        if self.kind == "float":
            exact = [_as_float(value) for value in values]
            return [item for item in exact if item is not None]
        if self.kind == "string":
            assert self.dictionary is not None
            whole = self.dictionary.codes([value for value in values if type(value) is str])
        else:
            whole = [item for item in map(_as_int, values) if item is not None]
        bounds = np.iinfo(self.array.dtype)
        return [item for item in whole if bounds.min <= item <= bounds.max]


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
            mask[self.rows[hits]] = True
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
            key = self.values.array.dtype.type(target)
            first = int(np.searchsorted(self.values.array, key, side="left"))
            last = int(np.searchsorted(self.values.array, key, side="right"))
            mask[self.rows[first:last]] = True
        return mask


KINDS: dict[type, Kind] = {str: "string", bool: "bool", int: "int", float: "float"}


def _as_int(value: Scalar) -> int | None:
    """The int equal to a number, if there is one."""
    if isinstance(value, bool | str):
        return None
    if isinstance(value, int):
        return value
    return int(value) if value.is_integer() else None


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


def _one_of(array: NDArray[Any], targets: Sequence[int] | Sequence[float]) -> Bools:
    """bool[len]: which items equal one of `targets` (all of them values that `array` can hold)."""
    if len(targets) <= _LOOP_MAX or array.dtype == np.bool_:
        mask: Bools = array == array.dtype.type(targets[0])
        for target in targets[1:]:
            mask |= array == array.dtype.type(target)
        return mask
    # Adding 0 turns -0.0 into 0.0.
    wanted = np.unique(np.array(targets, dtype=array.dtype) + array.dtype.type(0))
    if array.dtype.itemsize <= 2:
        table = np.zeros(1 << 8 * array.dtype.itemsize, dtype=np.bool_)
        table[_unsigned(wanted)] = True
        return table.take(_unsigned(array), mode="clip")  # In range anyway: "clip" is quicker.
    # A hash table of bits proposes, a binary search decides: most items stop at the table.
    table = np.zeros(1 << 16, dtype=np.bool_)
    table[_hash16(wanted)] = True
    mask = table.take(_hash16(array), mode="clip")
    candidates = np.flatnonzero(mask)
    found = array[candidates]
    places = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
    mask[candidates[wanted[places] != found]] = False
    return mask


def _unsigned(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")


def _hash16(array: NDArray[Any]) -> NDArray[Any]:
    """16 mixed bits of each 4- or 8-byte item; equal items hash alike, as -0.0 does not occur."""
    words = _unsigned(array)
    multiplier, shift = _HASHES[words.dtype.itemsize]
    mixed = words * multiplier
    mixed >>= shift
    # As signed numbers, the 8-byte ones are indexes without another conversion.
    signed: NDArray[Any] = mixed.view(f"i{words.dtype.itemsize}")
    return signed
