"""The catalog's tables. SQLAlchemy Core is the one description; Alembic migrates between versions.

`logs` is the row that everything about a collection is serialised on. Rows of `versions`,
`version_parts` and `parts` are immutable once committed. Times are microseconds since the epoch;
JSON is text; checksums are xxh3-64 as signed integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ochredb.catalog.core import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Recorded,
    Table,
    Text,
    UniqueConstraint,
    real,
)

FORMAT_VERSION = 3  # Of the whole store; a higher one in a store means: written by a newer OchreDB.

_metadata = MetaData()

if TYPE_CHECKING:
    metadata = _metadata
else:

    def __getattr__(name: str) -> MetaData:
        """`metadata`, for migrations: the real object with all tables."""
        if name != "metadata":
            raise AttributeError(name)
        for table in list(globals().values()):
            if isinstance(table, Recorded):
                real(table)
        return real(_metadata)


store = Table(
    "store",
    _metadata,
    Column("store_id", Text, primary_key=True),
    Column("format_version", Integer, nullable=False),
    Column("created_us", BigInteger, nullable=False),
)

tenants = Table(
    "tenants",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("resource_name", Text),
)

databases = Table(
    "databases",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    UniqueConstraint("tenant", "name"),
)

collections = Table(
    "collections",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("database_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("configuration", Text, nullable=False),
    Column("schema", Text, nullable=False),
    Column("metadata", Text),
    Column("created_us", BigInteger, nullable=False),
    UniqueConstraint("database_id", "name"),
)

# Metadata keys and value types that records of a collection have ever had.
collection_keys = Table(
    "collection_keys",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("type", Text, primary_key=True),
)

logs = Table(
    "logs",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("state", Text, nullable=False),  # live
    Column("dimension", Integer),
    Column("revision", Integer, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("next_offset", BigInteger, nullable=False),
    Column("indexed_offset", BigInteger, nullable=False),
    Column("floor_offset", BigInteger, nullable=False),
    Column("tail_bytes", BigInteger, nullable=False),  # Of fragments above indexed_offset.
    Column("time_us", BigInteger, nullable=False),  # Log time of the last append; never goes back.
    Column("unsettled_rows", BigInteger, nullable=False),  # In parts that wait for a merge.
)

# A fragment is one request: inline payload, or a byte range of a flush object.
fragments = Table(
    "fragments",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("start", BigInteger, primary_key=True),
    Column("stop", BigInteger, nullable=False),  # Last offset, included.
    Column("request_id", Text, nullable=False),
    Column("payload", LargeBinary),
    Column("object_key", Text),
    Column("byte_start", BigInteger),
    Column("byte_stop", BigInteger),
    Column("checksum", BigInteger, nullable=False),
    Column("time_us", BigInteger, nullable=False),
    UniqueConstraint("collection", "request_id"),
)

versions = Table(
    "versions",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("indexed_offset", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
)

version_parts = Table(
    "version_parts",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("part", Text, nullable=False),
    Column("deleted", LargeBinary),  # A roaring bitmap of rows, up to 32 KiB ...
    Column("deleted_key", Text),  # ... else the object that holds it.
    Column("deleted_count", BigInteger, nullable=False),
    Index("version_parts_by_part", "part"),
)

parts = Table(
    "parts",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("collection", Text, nullable=False),
    Column("manifest", Text, nullable=False),  # docs/formats/part.md
)

objects = Table(
    "objects",
    _metadata,
    Column("key", Text, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("state", Text, nullable=False),  # live | deleting | swept; the latter two are final.
    Column("unreferenced_us", BigInteger),
    Index("objects_by_unreferenced", "unreferenced_us"),
)

# Who keeps which object alive: a version of a collection, a fragment of its log, or a pin.
references = Table(
    "object_references",
    _metadata,
    Column("key", Text, primary_key=True),
    Column("kind", Text, primary_key=True),  # version | fragment | quarantine | pin
    Column("collection", Text, primary_key=True),  # Of a pin: the pin's id.
    Column("number", BigInteger, primary_key=True),  # The version, the first offset; pin: 0.
    Index("references_by_holder", "collection", "kind", "number"),
)

# Whoever reads for longer than a request may take, such as a backup, holds a pin and renews it.
pins = Table(
    "pins",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("until_us", BigInteger, nullable=False),
)

jobs = Table(
    "jobs",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("kind", Text, primary_key=True),  # compact | merge | collect
    Column("owner", Text, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("until_us", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("last_error", Text),
)

# Operations that cannot be folded, as a fragment of their own: inline payload or an object.
quarantine = Table(
    "quarantine",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("start", BigInteger, primary_key=True),
    Column("stop", BigInteger, nullable=False),  # Last offset, included.
    Column("reason", Text, nullable=False),
    Column("payload", LargeBinary),
    Column("object_key", Text),
    Column("checksum", BigInteger, nullable=False),
    Column("time_us", BigInteger, nullable=False),
)

idempotency = Table(
    "idempotency",
    _metadata,
    Column("collection", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_hash", LargeBinary, nullable=False),
    Column("first_offset", BigInteger, nullable=False),
    Column("last_offset", BigInteger, nullable=False),
    Column("time_us", BigInteger, nullable=False),
    Index("idempotency_by_time", "time_us"),
)
