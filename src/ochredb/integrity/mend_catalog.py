"""A sealed catalog of which one bit in a page was flipped gets its bytes back."""

from __future__ import annotations

import os
from collections.abc import Callable

from ochredb.catalog.seal import Seal
from ochredb.catalog.seal_check import Compared
from ochredb.crash_points import reach
from ochredb.integrity.evidence import Evidence
from ochredb.integrity.mend import WRONG_BLOCKS_MAX, flipped_bit
from ochredb.storage import files
from ochredb.storage.open_directory import CATALOG_FILE


def mend_catalog(root: str, evidence: Evidence, step: Callable[[], None]) -> str | None:
    """What was done; None if nothing is wrong with the sealed bytes, or nothing can be done.

    Nobody can open the catalog meanwhile, who would go on with it: what is put back is its past.
    """
    path = os.path.join(root, CATALOG_FILE)
    if not os.path.exists(path):
        return None
    with Seal(path).kept_shut() as compared:
        if compared is None or compared.problem is None:
            return None
        with files.opened(path) as descriptor:
            content = bytearray(files.read_range(descriptor, 0, files.size_of(descriptor)))
            times = os.fstat(descriptor)
        right = _mended(content, compared, step)
        if right is None:
            return None
        evidence.keep_file(CATALOG_FILE)
        new_path = os.path.join(evidence.path, f"{CATALOG_FILE}.new")
        with files.opened(new_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            files.write_all(descriptor, [memoryview(right)])
            # By its time the seal knows the file.
            os.utime(descriptor, ns=(times.st_atime_ns, times.st_mtime_ns))
            files.sync(descriptor)
        reach("mended-catalog.synced")
        os.replace(new_path, path)
        reach("mended-catalog.renamed")
        files.sync_folder(root)
        reach("mended-catalog.durable")
    return "it is as it was sealed"


def _mended(content: bytearray, compared: Compared, step: Callable[[], None]) -> bytearray | None:
    sealed = compared.sealed
    size = sealed.state.size_bytes
    if compared.is_whole:
        if len(content) < size:
            return None
        del content[size:]
    wrong = compared.wrong
    if not compared.wrong and not compared.is_whole:
        return None  # It is the write-ahead log that is damaged.
    if len(wrong) > WRONG_BLOCKS_MAX:
        return None
    for block in wrong:
        place = slice(block * sealed.block_bytes, (block + 1) * sealed.block_bytes)
        right = flipped_bit(bytes(content[place]), int(sealed.checksums[block]), step)
        if right is None:
            return None
        content[place] = right
    return content
