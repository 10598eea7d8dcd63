"""Power loss without pulling the plug: what was not synced is dropped (see powerloss.c).

loss = PowerLoss(library, tree, log)
process = subprocess.Popen(command, env={**os.environ, **loss.environ()})
...                      # kill -9
loss.strike()            # `tree` now holds what was durable, and nothing else
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("powerloss.c")
# What each record begins with. Nothing that is recorded contains it: the log is outside the tree.
MAGIC = (0x31474F4C53534F4C).to_bytes(8, "little")
_HEAD_BYTES = 40

FileId = tuple[int, int]


def build_library(folder: Path) -> Path:
    """Compile the recorder into `folder` with the system's C compiler."""
    library = folder / "powerloss.so"
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-D_LARGEFILE64_SOURCE"]
    libraries = ["-ldl", "-lpthread"]
    subprocess.run(["cc", *flags, "-o", str(library), str(SOURCE), *libraries], check=True)
    return library


def begin(environ: Mapping[str, str]) -> None:
    """Observe this process from here on; it was started with LD_PRELOAD and nothing else.

    environ: of `PowerLoss.environ`. Whoever was forked before is not observed.
    """
    os.environ.update(environ)
    ctypes.CDLL(None).powerloss_start()


@dataclass
class Durable:
    """What the log says: contents by file, and entries (name -> is a folder, id) by folder."""

    root: FileId | None = None
    contents: dict[FileId, bytearray] = field(default_factory=dict)
    folders: dict[FileId, dict[str, tuple[bool, FileId]]] = field(default_factory=dict)
    started: bool = False  # The log has the whole tree of the start.
    records: int = 0

    def write_tree(self, path: str) -> None:
        """Make a new folder that holds everything durable, by way of durable names only."""
        assert self.root is not None, "the log has no root"
        self._write_folder(self.root, path)

    def _write_folder(self, identity: FileId, path: str) -> None:
        os.mkdir(path)
        for name, (is_folder, child) in self.folders.get(identity, {}).items():
            child_path = os.path.join(path, name)
            if is_folder:
                self._write_folder(child, child_path)
            else:
                with open(child_path, "wb") as file:
                    file.write(self.contents.get(child, b""))


@dataclass(frozen=True)
class PowerLoss:
    """One tree under observation, from a process's start to `strike`."""

    library: Path
    tree: str
    log: str

    def environ(self) -> dict[str, str]:
        """The variables that put a process under observation; a log that is there is continued."""
        return {
            "LD_PRELOAD": str(self.library),
            "POWERLOSS_ROOT": os.path.realpath(self.tree),
            "POWERLOSS_LOG": self.log,
        }

    def forget(self) -> None:
        """The next process to start finds everything durable that is then there."""
        Path(self.log).unlink(missing_ok=True)

    def strike(self) -> Durable:
        """Replace the tree by what is durable. All observed processes must have ended."""
        durable = read_log(self.log)
        if not durable.started:
            # Killed before its first instruction (or without a log at all): nothing was done.
            self.forget()
            return durable
        before, after = self.tree + ".before-loss", self.tree + ".after-loss"
        for path in (before, after):
            shutil.rmtree(path, ignore_errors=True)
        durable.write_tree(after)
        os.rename(self.tree, before)
        os.rename(after, self.tree)
        shutil.rmtree(before)
        self.forget()
        return durable


def read_log(path: str) -> Durable:
    """Replay a recorder's log, if there is one.

    A record cut off is of a sync that never returned, and is ignored: at the end, or where a
    process was killed and the next one went on with the log.
    """
    durable = Durable()
    data = Path(path).read_bytes() if os.path.exists(path) else b""
    log, position = memoryview(data), 0
    while position < len(data):
        found = data.startswith(MAGIC[: len(data) - position], position)
        assert found, f"the log is damaged at byte {position}"
        size = _whole_record(data, position)
        if size is None:
            following = data.find(MAGIC, position + 1)
            position = len(data) if following < 0 else following
            continue
        kind, inode, birth = struct.unpack_from("<QQQ", log, position + 16)
        body = log[position + _HEAD_BYTES : position + size]
        if kind == ord("R"):
            durable.root = (inode, birth)
        elif kind == ord("S"):
            durable.started = True
        elif kind == ord("D"):
            durable.folders[inode, birth] = _read_entries(body)
        elif kind == ord("F"):
            _apply_file(durable.contents.setdefault((inode, birth), bytearray()), body)
        else:
            raise AssertionError(f"unknown record {kind}")
        durable.records += 1
        position += size
    return durable


def _whole_record(data: bytes, position: int) -> int | None:
    """The size of the record at `position`, or None if it was cut off.

    What follows a whole record is another one, which may itself be cut off, or the end.
    """
    if position + _HEAD_BYTES > len(data):
        return None
    (size,) = struct.unpack_from("<Q", data, position + 8)
    stop = position + int(size)
    if size < _HEAD_BYTES or stop > len(data):
        return None
    return int(size) if data.startswith(MAGIC[: len(data) - stop], stop) else None


def _read_entries(body: memoryview) -> dict[str, tuple[bool, FileId]]:
    entries = {}
    position = 0
    while position < len(body):
        inode, birth, kind, length = struct.unpack_from("<QQQQ", body, position)
        position += 32
        name = os.fsdecode(bytes(body[position : position + length]))
        position += length
        entries[name] = (kind == ord("D"), (inode, birth))
    return entries


def _apply_file(content: bytearray, body: memoryview) -> None:
    """Cut to the smallest size since the last sync, put the ranges in, then set the final size."""
    size_min, size, ranges = struct.unpack_from("<QQQ", body)
    del content[size_min:]
    position = 24
    for _ in range(ranges):
        start, length = struct.unpack_from("<QQ", body, position)
        position += 16
        if len(content) < start:
            content.extend(bytes(start - len(content)))
        content[start : start + length] = body[position : position + length]
        position += length
    del content[size:]
    content.extend(bytes(size - len(content)))
    assert position == len(body)
