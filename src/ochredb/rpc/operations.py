"""Operations and what becomes of them on the wire. Operations travel as the log will hold them."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from ochredb import fragment
from ochredb.checksum import xxh3
from ochredb.errors import Unavailable
from ochredb.proto.v1 import log_pb2 as pb
from ochredb.types import Appended, Operations


def encode(operations: Operations) -> pb.Operations:
    """Cost: as `fragment.encode`, and a copy. Raises InvalidArgument for what is never folded."""
    if len(operations) == 0:
        return pb.Operations()
    fragment.check(operations)
    payload = fragment.encode(operations)
    return pb.Operations(
        fragment=payload.to_pybytes(),
        checksum=xxh3(memoryview(payload)),
        key_types=[pb.KeyType(key=key, type=kind) for key, kind in operations.key_types],
    )


def decode(message: pb.Operations) -> Operations | None:
    """The operations, with their bytes, which are not encoded again; None: there are none.

    Raises Unavailable if they were damaged on their way, Corrupt if they are no fragment.
    """
    if not message.fragment:
        return None
    payload = pa.py_buffer(message.fragment)
    if xxh3(memoryview(payload)) != message.checksum:
        raise Unavailable("the operations were damaged on their way; nothing was written")
    key_types = frozenset((each.key, each.type) for each in message.key_types)
    return replace(fragment.decode(payload), key_types=key_types, encoded=payload)


def encode_appended(appended: Appended) -> pb.Appended:
    return pb.Appended(
        first_offset=appended.first_offset,
        last_offset=appended.last_offset,
        deleted=appended.deleted,
        was_repeated=appended.repeated,
    )


def decode_appended(message: pb.Appended) -> Appended:
    return Appended(
        message.first_offset,
        message.last_offset,
        deleted=message.deleted if message.HasField("deleted") else None,
        repeated=message.was_repeated,
    )
