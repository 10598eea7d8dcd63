"""`$in` over one column: every way of looking values up finds what comparing one by one finds."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ochredb.parts import typed
from ochredb.parts.typed import Values
from ochredb.types import Bools

_ROWS = 40_000  # More than one step.


def one_of(array: NDArray[Any], wanted: list[Any]) -> Bools:
    kind: typed.Kind = "float" if array.dtype.kind == "f" else "int"
    found = Values(kind, array).one_of(wanted)
    return np.zeros(len(array), np.bool_) if found is None else found


def integers(low: int, high: int, dtype: Any) -> NDArray[Any]:
    rng = random.Random(high)
    return np.array([rng.randint(low, high) for _ in range(_ROWS)], dtype=dtype)


ARRAYS: dict[str, NDArray[Any]] = {
    "int8": integers(-128, 127, np.int8),
    "int16": integers(-(2**15), 2**15 - 1, np.int16),
    "int32 near": integers(-300, 300, np.int32),
    "int32": integers(-(2**31), 2**31 - 1, np.int32),
    "int64 near": integers(-300, 300, np.int64),
    "int64 near the top": integers(2**63 - 1_000, 2**63 - 1, np.int64),
    "int64 near the bottom": integers(-(2**63), -(2**63) + 1_000, np.int64),
    "int64": integers(-(2**63), 2**63 - 1, np.int64),
    "float64": integers(-900, 900, np.float64) / 8 + 0.0,
}


@pytest.mark.parametrize("count", [1, 8, 9, 100, 3_000])
@pytest.mark.parametrize("name", ARRAYS)
def test_numbers(name: str, count: int) -> None:
    array = ARRAYS[name]
    present = array[: 2 * count : 2].tolist()
    absent = [value + 1 for value in array[1 : 2 * count : 4].tolist()]
    wanted = [*present, *absent, *present]
    exact = set(wanted)
    assert one_of(array, wanted).tolist() == [value in exact for value in array.tolist()]


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_values_whose_hashes_collide(
    dtype: Any, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of four slots: nearly all collide, and most are left when the tables are full."""
    monkeypatch.setattr(typed, "_SLOT_BITS_MAX", 2)
    monkeypatch.setattr(typed, "_RANGE_MAX", 0)
    monkeypatch.setattr(typed, "_ROUNDS_MAX", rounds)
    array = integers(-500, 500, dtype)
    for count in (9, 12, 20, 200):
        wanted = list(range(-400, -400 + 3 * count, 3))
        assert np.array_equal(one_of(array, wanted), np.isin(array, wanted))


@pytest.mark.parametrize("distinct", [200, 30_000, 300_000])
def test_codes_of_strings(distinct: int) -> None:
    """Codes of one, two and four bytes, and more of them than a table has places."""
    codes = np.arange(distinct)
    array = codes.astype(np.min_scalar_type(distinct - 1))
    wanted = np.concatenate([codes[-20:], codes[:100:7]]).astype(array.dtype)
    assert np.array_equal(typed._one_of(array, wanted), np.isin(codes, wanted))
    assert np.array_equal(typed._one_of(array, wanted[-15:]), np.isin(codes, wanted[-15:]))


def test_zeros_of_both_signs_are_one_number() -> None:
    array = np.array([0.0, 1.0, 2.0])
    assert one_of(array, [-0.0]).tolist() == [True, False, False]
    assert one_of(array, [-0.0, *range(5, 20)]).tolist() == [True, False, False]
    assert one_of(array, [-0.0, *(number / 3 for number in range(20, 40))]).tolist() == [
        True, False, False
    ]  # fmt: skip
    assert one_of(np.array([0, 1], np.int8), [-0.0]).tolist() == [True, False]


def test_what_is_no_number_of_the_column_is_not_found() -> None:
    ints, floats = np.array([1, 2**53 + 1]), np.array([1.0, 2.0**53])
    assert one_of(ints, [float(2**53), 1.5, float("nan"), float("inf")]).tolist() == [False, False]
    assert one_of(floats, [2**53 + 1, 10**400, 2]).tolist() == [False, False]
    assert one_of(ints, [True, "1"]).tolist() == [False, False]
    assert one_of(floats, [float("nan")] * 20).tolist() == [False, False]
    assert one_of(np.array([1], np.int8), [257, -255, 2**64 + 1]).tolist() == [False]
