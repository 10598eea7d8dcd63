"""Seals as releases before 0.2 wrote them: of blocks, of a catalog that is closed."""

from __future__ import annotations

import struct

from ochredb.checksum import BLOCK_BYTES, block_checksums, xxh3


def seal_of_blocks(catalog: bytes) -> bytes:
    """The seal of a catalog of these bytes, format 1 (docs/formats/seal.md)."""
    content = struct.pack("<8sIIQ", b"OCHRSEAL", 1, BLOCK_BYTES, len(catalog))
    content += block_checksums(catalog).tobytes()
    return content + struct.pack("<Q", xxh3(content))
