"""A catalog that was sealed and has one flipped bit in a block gets its bytes back."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ochredb.catalog.seal import Seal, checksums_of, decode
from ochredb.checksum import BLOCK_BYTES
from ochredb.errors import Corrupt
from ochredb.integrity.evidence import Evidence
from ochredb.integrity.mend import WRONG_BLOCKS_MAX, flipped_bit
from ochredb.storage import files
from ochredb.storage.open_directory import CATALOG_FILE


def mend_catalog(root: str, evidence: Evidence, step: Callable[[], None]) -> str | None:
    """What was done; None if nothing is wrong with the sealed bytes, or nothing can be done.

    Nobody may have the store open: then its catalog would have been unsealed.
    """
    path = os.path.join(root, CATALOG_FILE)
    seal = Seal(path)
    try:
        seal.hold()
    except Corrupt:
        pass
    else:
        seal.let_go(seal=False)
        return None
    try:
        with open(seal.path, "rb") as file:
            sealed = decode(file.read())
        with files.opened(path) as descriptor:
            content = bytearray(files.read_range(descriptor, 0, files.size_of(descriptor)))
    except FileNotFoundError:
        return None
    if sealed is None or len(content) < sealed[0]:
        return None
    size, expected = sealed
    found = checksums_of(path)[: len(expected)]
    del content[size:]
    wrong = np.flatnonzero(found != expected).tolist()
    if len(wrong) > WRONG_BLOCKS_MAX:
        return None
    for block in wrong:
        place = slice(block * BLOCK_BYTES, min(size, (block + 1) * BLOCK_BYTES))
        right = flipped_bit(bytes(content[place]), int(expected[block]), step)
        if right is None:
            return None
        content[place] = right
    evidence.keep_file(CATALOG_FILE)
    with files.opened(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
        files.write_all(descriptor, [memoryview(content)])
        files.sync(descriptor)
    os.replace(path + ".new", path)
    files.sync_folder(root)
    return "it is as it was closed"
