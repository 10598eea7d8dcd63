"""What requests and replies carry: buffers that are not joined, and pieces as they come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ochredb.storage.base import Take

_READ_BYTES = 256 << 10


def whole(views: Sequence[memoryview]) -> bytearray:
    """The buffers in one; boto3 sends it with the header, where it asks first before a file."""
    body = bytearray()
    for view in views:
        body += view
    return body


class Pieces:
    """A file that is read from its buffers. Reads may be shorter than asked, and are not copies."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        """views: one-dimensional, of bytes, none empty."""
        self._views = views
        self._size = sum(view.nbytes for view in views)
        self._index = self._within = self._place = 0

    def __len__(self) -> int:
        return self._size

    def read(self, amount: int | None = -1) -> memoryview:
        """Up to `amount` bytes of one buffer; empty at the end."""
        if self._index == len(self._views):
            return memoryview(b"")
        view = self._views[self._index]
        stop = view.nbytes if amount is None or amount < 0 else self._within + amount
        piece = view[self._within : stop]
        self._within += piece.nbytes
        self._place += piece.nbytes
        if self._within == view.nbytes:
            self._index, self._within = self._index + 1, 0
        return piece

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        place = base + offset
        if not 0 <= place <= self._size:
            raise ValueError(f"no place in {self._size} bytes: {place}")
        self._index = self._within = self._place = 0
        while self._index < len(self._views):
            length = self._views[self._index].nbytes
            if self._place + length > place:
                self._within = place - self._place
                break
            self._place += length
            self._index += 1
        self._place = place
        return place


def filler(content: bytearray, start: int) -> Take:
    """Puts pieces where they belong; `content` begins at byte `start` of the object."""
    view = memoryview(content)

    def take(place: int, piece: memoryview) -> None:
        view[place - start : place - start + piece.nbytes] = piece

    return take


def read_all(body: Any, start: int, length: int, take: Take) -> None:
    """Hand over `length` bytes of boto3's streaming body, of which the first has place `start`.

    Raises ConnectionError if there are fewer.
    """
    buffer = memoryview(bytearray(min(length, _READ_BYTES)))
    done = 0
    while done < length:
        count = body.readinto(buffer[: length - done])
        if not count:
            raise ConnectionError(f"it broke off after {done} of {length} bytes")
        take(start + done, buffer[:count])
        done += count
    body.read()  # Nothing, so that the connection is used again.
