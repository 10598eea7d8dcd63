"""Where damaged bytes are kept: `damaged/` beside the store's objects, until somebody deletes it.

What is there is a second name of the damaged file, so it takes no space while the first one lives,
and garbage collection never comes there. Nor does a purge: it tells what is `kept_aside`. A file
appears whole or not at all.

A repair may be killed at any moment. So what it is about to give up is named here first, in a
`loss-N.json` each; `report.json`, which names everything, is written when it has come to its end.
"""

from __future__ import annotations

import errno
import os
import shutil
from typing import Any

import orjson

from ochredb.crash_points import reach
from ochredb.errors import Unavailable
from ochredb.storage import files
from ochredb.storage.open_directory import CATALOG_FILE

FOLDER = "damaged"
REPORT = "report.json"
_CATALOG_FILES = frozenset({CATALOG_FILE, f"{CATALOG_FILE}-wal", f"{CATALOG_FILE}-shm"})
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK)


def kept_aside(root: str) -> list[str]:
    """What is kept of damage in a store's directory, relative to it; no engine reads it.

    The folders of repairs, and files that are named after the catalog: a write-ahead log that was
    too short, what a repair was killed over, a copy that somebody made. Raises Unavailable.
    """
    try:
        names = [name for name in os.listdir(root) if name.startswith(CATALOG_FILE)]
        folder = os.path.join(root, FOLDER)
        repairs = os.listdir(folder) if os.path.lexists(folder) else []
    except OSError as error:
        raise Unavailable(f"cannot list what is kept in {root}: {error.strerror}") from error
    kept = [name for name in names if name not in _CATALOG_FILES]
    return sorted([*kept, *(os.path.join(FOLDER, name) for name in repairs)])


class Evidence:
    """The folder of one repair, made when the first thing is kept."""

    def __init__(self, root: str, repair_id: str) -> None:
        self._root = root
        self.path = os.path.join(root, FOLDER, repair_id)
        self._losses = 0

    def keep_object(self, key: str) -> None:
        """Keep an object as it is; one that is missing leaves nothing to keep."""
        self.keep_file(os.path.join("objects", key))

    def keep_file(self, name: str) -> None:
        """The same of any file; `name` is relative to the store."""
        source, target = os.path.join(self._root, name), os.path.join(self.path, name)
        if os.path.exists(target) or not os.path.exists(source):
            return
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                os.link(source, target)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                shutil.copyfile(source, _unnamed(target))
                _sync_and_name(target)
            reach("evidence.named")
            _sync_name(target)
        except OSError as error:
            raise Unavailable(f"cannot keep {source}: {error.strerror}") from error

    def keep_bytes(self, name: str, data: bytes) -> None:
        """Keep what lies in no file of its own."""
        target = os.path.join(self.path, name)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with files.opened(_unnamed(target), flags) as descriptor:
                if data:
                    files.write_all(descriptor, [memoryview(data)])
            _sync_and_name(target)
            reach("evidence.named")
            _sync_name(target)
        except OSError as error:
            raise Unavailable(f"cannot write {target}: {error.strerror}") from error

    def keep_loss(self, document: Any) -> None:
        """Say what is about to be given up: whoever is killed once it is gone cannot say it."""
        self._losses += 1
        self._keep_document(f"loss-{self._losses}.json", document)

    def keep_report(self, document: Any) -> None:
        """Say beside the damaged bytes what they are; nothing if nothing was kept."""
        if os.path.isdir(self.path):
            self._keep_document(REPORT, document)

    def _keep_document(self, name: str, document: Any) -> None:
        self.keep_bytes(name, orjson.dumps(document, option=orjson.OPT_INDENT_2))


def unfinished(root: str) -> list[str]:
    """Folders, relative to the store's, of repairs that kept something and came to no end."""
    try:
        names = sorted(os.listdir(os.path.join(root, FOLDER)))
    except FileNotFoundError:
        return []
    folders = [os.path.join(FOLDER, name) for name in names]
    return [f for f in folders if not os.path.exists(os.path.join(root, f, REPORT))]


def _unnamed(target: str) -> str:
    return target + ".new"


def _sync_and_name(target: str) -> None:
    """What is written beside it takes its place."""
    reach("evidence.written")
    with files.opened(_unnamed(target)) as descriptor:
        files.sync(descriptor)
    reach("evidence.synced")
    os.replace(_unnamed(target), target)


def _sync_name(target: str) -> None:
    """Of what has its name; the folders are of our making."""
    files.sync_folder(os.path.dirname(target))
    files.sync_parents(os.path.dirname(target))
    reach("evidence.kept")
