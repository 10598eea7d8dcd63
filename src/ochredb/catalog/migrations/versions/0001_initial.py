"""Format version 1: the tables as first released, spelled out: `schema` has moved on since."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from ochredb.catalog.migrations.types import TEXT, Kind

revision = "0001"
down_revision = None


def _key(name: str, kind: Kind = TEXT) -> sa.Column[Any]:
    return sa.Column(name, kind, primary_key=True)


def _must(name: str, kind: Kind = TEXT) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


def _may(name: str, kind: Kind = TEXT) -> sa.Column[Any]:
    return sa.Column(name, kind)


def _tables() -> sa.MetaData:
    """The tables of then. Never changed: a later step spells out what it changes."""
    number, small, binary = sa.BigInteger, sa.Integer, sa.LargeBinary
    columns: dict[str, list[sa.schema.SchemaItem]] = {
        "store": [_key("store_id"), _must("format_version", small), _must("created_us", number)],
        "tenants": [_key("name"), _may("resource_name")],
        "databases": [
            _key("id"), _must("tenant"), _must("name"), sa.UniqueConstraint("tenant", "name"),
        ],
        "collections": [
            _key("id"), _must("database_id"), _must("name"), _must("configuration"),
            _must("schema"), _may("metadata"), _must("created_us", number),
            sa.UniqueConstraint("database_id", "name"),
        ],
        "collection_keys": [_key("collection"), _key("key"), _key("type")],
        "logs": [
            _key("collection"), _must("state"), _may("dimension", small), _must("revision", small),
            _must("version", number), _must("next_offset", number),
            _must("indexed_offset", number), _must("floor_offset", number),
            _must("tail_bytes", number), _must("time_us", number), _must("unsettled_rows", number),
        ],
        "fragments": [
            _key("collection"), _key("start", number), _must("stop", number), _must("request_id"),
            _may("payload", binary), _may("object_key"), _may("byte_start", number),
            _may("byte_stop", number), _must("checksum", number), _must("time_us", number),
            sa.UniqueConstraint("collection", "request_id"),
        ],
        "versions": [
            _key("collection"), _key("version", number), _must("indexed_offset", number),
            _must("created_us", number),
        ],
        "version_parts": [
            _key("collection"), _key("version", number), _key("position", small), _must("part"),
            _may("deleted", binary), _may("deleted_key"), _must("deleted_count", number),
            sa.Index("version_parts_by_part", "part"),
        ],
        "parts": [_key("id"), _must("collection"), _must("manifest")],
        "objects": [
            _key("key"), _must("size", number), _must("state"), _may("unreferenced_us", number),
            sa.Index("objects_by_unreferenced", "unreferenced_us"),
        ],
        "object_references": [
            _key("key"), _key("kind"), _key("collection"), _key("number", number),
            sa.Index("references_by_holder", "collection", "kind", "number"),
        ],
        "jobs": [
            _key("collection"), _key("kind"), _must("owner"), _must("fence", number),
            _must("until_us", number), _must("attempts", small), _may("last_error"),
        ],
        "quarantine": [
            _key("collection"), _key("offset", number), _must("reason"), _must("time_us", number),
        ],
        "idempotency": [
            _key("collection"), _key("key"), _must("request_hash", binary),
            _must("first_offset", number), _must("last_offset", number), _must("time_us", number),
            sa.Index("idempotency_by_time", "time_us"),
        ],
    }  # fmt: skip
    metadata = sa.MetaData()
    for name, items in columns.items():
        sa.Table(name, metadata, *items)
    return metadata


def upgrade() -> None:
    """Create what is not there: a crash of an early release may have left some of the tables."""
    _tables().create_all(op.get_bind())


def downgrade() -> None:
    """There is nothing before the first version."""
    raise NotImplementedError("the first format has no predecessor")
