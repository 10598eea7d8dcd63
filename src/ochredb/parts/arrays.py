"""Typed arrays inside binary sections: how every derived index is laid out.

An index has two sections, `NAME/directory` (a JSON object with `"format"`, a version number) and
`NAME/arrays` (its arrays one after another, each at a multiple of 8 bytes, little-endian). The
directory refers to an array as `[offset, dtype, count]`: bytes from the start of the section, a
numpy type string such as "<i4", and the number of items. Readers are views of the section: nothing
is copied.

Whatever the bytes are, a reader returns an array that lies inside its section or raises Corrupt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ochredb.errors import Corrupt, NewerFormat, newer_message
from ochredb.json_text import loads

Section = bytes | memoryview | NDArray[np.uint8]
SectionSource = Callable[[str], memoryview | None]
ArrayRef = list[Any]

_ALIGNMENT_BYTES = 8
_ITEM_BYTES = {
    "|b1": 1, "|u1": 1, "|i1": 1, "<u2": 2, "<i2": 2,
    "<u4": 4, "<i4": 4, "<f4": 4, "<u8": 8, "<i8": 8, "<f8": 8,
}  # fmt: skip

assert sys.byteorder == "little", "the formats are little-endian and are mapped as they lie"


class ArrayWriter:
    """Collects arrays; `add` names the place that each will have in `data()`."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, NDArray[Any]]] = []
        self._size_bytes = 0

    def add(self, array: NDArray[Any]) -> ArrayRef:
        """Append a one-dimensional array of one of the allowed types; returns its reference."""
        array = np.ascontiguousarray(array)
        assert array.ndim == 1
        assert array.dtype.str in _ITEM_BYTES, array.dtype
        offset = -(-self._size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._arrays.append((offset, array))
        self._size_bytes = offset + array.nbytes
        return [offset, array.dtype.str, len(array)]

    def data(self) -> NDArray[np.uint8]:
        """The section, uint8[size]; gaps are zero. Cost: one copy of everything."""
        data = np.zeros(self._size_bytes, dtype=np.uint8)
        for offset, array in self._arrays:
            data[offset : offset + array.nbytes] = array.view(np.uint8)
        return data


class ArrayReader:
    """Views of the arrays in one section. `name` is for messages."""

    def __init__(self, data: memoryview | None, name: str) -> None:
        self._data = memoryview(b"") if data is None else data.cast("B")
        self._name = name

    def check(self, ref: object, *dtypes: str, count: int | None = None) -> None:
        """Raises Corrupt unless `ref` names an array inside the section, of one of `dtypes`.

        count: the number of items that it must have, if that is known.
        """
        if isinstance(ref, list) and len(ref) == 3:
            offset, dtype, items = ref
            if type(offset) is int and type(items) is int and dtype in dtypes:
                end = offset + items * _ITEM_BYTES[dtype]
                inside = 0 <= offset <= end <= len(self._data) and items >= 0
                if inside and offset % _ALIGNMENT_BYTES == 0 and count in (None, items):
                    return
        raise Corrupt(f"{self._name}: bad reference to an array: {ref!r}")

    def get(self, ref: Any) -> NDArray[Any]:
        """The array; `ref` must have passed `check`."""
        offset, dtype, count = ref
        if count == 0:  # numpy refuses an offset at the very end.
            return np.empty(0, dtype=dtype)
        return np.frombuffer(self._data, dtype=dtype, count=count, offset=offset)


def write_directory(directory: dict[str, Any]) -> bytes:
    return orjson.dumps(directory)


def read_directory(section: SectionSource, name: str, format_version: int) -> dict[str, Any]:
    """The JSON object in section `name`.

    Raises NewerFormat for the format of a newer release, Corrupt if it is absent or anything else.
    """
    data = section(name)
    if data is None:
        raise Corrupt(f"{name}: the section is missing")
    try:
        directory = loads(data)
    except orjson.JSONDecodeError as error:
        raise Corrupt(f"{name}: not JSON: {error}") from error
    if not isinstance(directory, dict):
        raise Corrupt(f"{name}: expected an object")
    found = directory.get("format")
    if type(found) is int and found > format_version:
        raise NewerFormat(newer_message(f"section {name} of a part", found, format_version))
    if found != format_version:
        raise Corrupt(f"{name}: expected format {format_version}")
    return directory


def directory_count(directory: dict[str, Any], key: str, name: str) -> int:
    """A number of items from a directory. Raises Corrupt unless it is an int in 0 .. 2**31 - 1."""
    value = directory.get(key)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise Corrupt(f"{name}: {key} is {value!r}")
    return value
