"""What the quarantine of a store holds: listed with names, read, dropped (docs/guides/upgrades.md).

The same from an embedded client and from a server: `ochredb quarantine` asks either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from ochredb.catalog.namespace import Namespace
from ochredb.catalog.quarantine import Quarantined, QuarantineTable
from ochredb.checksum import signed, xxh3
from ochredb.errors import Corrupt, NotFound, OchreError
from ochredb.fragment import Unfoldable, open_batch
from ochredb.storage.base import ObjectStore
from ochredb.types import CollectionInfo


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Blocking, thread-safe."""

    table: QuarantineTable
    namespace: Namespace
    store: ObjectStore

    def list(
        self, after: tuple[str, int], limit: int
    ) -> list[tuple[Quarantined, CollectionInfo | None]]:
        """Rows behind `after`, by collection and offset; None for a collection dropped meanwhile.

        Cost: a few look-ups in the catalog for each collection.
        """
        infos: dict[str, CollectionInfo | None] = {}
        rows = self.table.list(after, limit)
        for row in rows:
            if row.collection not in infos:
                infos[row.collection] = None
                with contextlib.suppress(NotFound):
                    infos[row.collection] = self.namespace.get_collection_by_id(row.collection)
        return [(row, infos[row.collection]) for row in rows]

    def read(self, collection: str, start: int) -> bytes:
        """The bytes of a row. Raises NotFound, Corrupt."""
        return self._content(self.table.get(collection, start))

    def damaged(self) -> Iterator[tuple[Quarantined, str]]:
        """The rows whose bytes cannot be read, and why. Cost: reads everything that is here."""
        after = ("", 0)
        while rows := self.table.list(after):
            for row in rows:
                try:
                    self._content(row)
                except OchreError as error:
                    yield row, str(error)
            after = (rows[-1].collection, rows[-1].start)

    def _content(self, row: Quarantined) -> bytes:
        data = row.payload if row.object_key is None else self.store.get(row.object_key)
        if data is None or signed(xxh3(data)) != row.checksum:
            raise Corrupt(
                f"operation {row.start} of collection {row.collection} fails its checksum"
            )
        return bytes(data)

    def drop(self, collection: str, start: int) -> None:
        """Forget a row and its bytes for ever. Raises NotFound."""
        self.table.drop(collection, start)


def describe(data: bytes) -> Iterator[dict[str, Any]]:
    """What can be read of quarantined operations, one at a time, without their vectors.

    Raises Unfoldable if the bytes cannot even be taken apart.
    """
    op, batch = open_batch(data)
    for row in range(batch.num_rows):
        record: dict[str, Any] = {"operation": op.name.lower()}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name != "embedding":
                plain = column.view(pa.binary()) if column.type == pa.string() else column
                record[name] = _readable(plain[row].as_py())
            elif column[row].is_valid:
                record["dimension"] = column.type.list_size
        yield record


def _readable(value: bytes | None) -> Any:
    """Text, a JSON value if it is one, or bytes as Python writes them."""
    if value is None:
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return repr(value)
    if text[:1] == "{":
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(text)
    return text


__all__ = ["Quarantine", "Unfoldable", "describe"]
