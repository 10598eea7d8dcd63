"""The checks made before a database directory is used: better no start than a damaged one later.

A directory is ours if it has the catalog's file or the marker, which is the first thing that is
ever put into it (so that a crash during the very first start leaves a directory that is ours, or
empty). What is neither ours nor empty is refused, and never written into.

SQLite's locks and shared memory do not work on network file systems, so those are refused too
(decision 0019 goes through them); `OCHREDB_ALLOW_NETWORK_FS=1` in the environment allows them for a
single process, and `claim_alone` keeps a second one out as far as the file system's locks reach.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Mapping

from ochredb.clock import Clock, SystemClock
from ochredb.crash_points import reach
from ochredb.errors import InvalidArgument, OchreError, StorageFull, Unavailable
from ochredb.ids import IdSource, uuid7_time_us
from ochredb.storage import files
from ochredb.storage.space import is_full

CATALOG_FILE = "ochredb.sqlite3"
MARKER_FILE = "ochredb.txt"
CHROMA_FILE = "chroma.sqlite3"
MOUNTINFO_FILE = "/proc/self/mountinfo"
ALLOW_NETWORK_VARIABLE = "OCHREDB_ALLOW_NETWORK_FS"

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2", "glusterfs",
        "gpfs", "lustre", "ncpfs", "ncp", "nfs", "nfs4", "ocfs2", "orangefs", "pvfs2", "smb3",
        "smbfs",
        "fuse.ceph", "fuse.ceph-fuse", "fuse.cifs", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs",
        "fuse.goofys", "fuse.juicefs", "fuse.lustre", "fuse.nfs", "fuse.rclone", "fuse.s3fs",
        "fuse.seaweedfs", "fuse.smbnetfs", "fuse.sshfs", "fuse.moosefs",
        "fuse.blobfuse", "fuse.blobfuse2", "fuse.mount-s3", "fuse.s3backer", "fuse.vmhgfs-fuse",
        "prl_fs", "vboxsf", "vmhgfs",
    }
)  # fmt: skip

_ALONE_FILE = "alone.lock"
_PROBE_PREFIX = ".ochredb-probe-"
_PUBLISHED = "-published"
_PROBES_MAX = 3
_PROBE_ABANDONED_US = 600_000_000
_NOT_FOREIGN = {"lost+found"}  # In the top folder of each new ext volume.
_MARKER_TEXT = b"""This directory is an OchreDB database.
Do not add, change or remove files in it; copy it only while no process has it open.
"""


def check_directory(
    path: str, environ: Mapping[str, str] = os.environ, *, clock: Clock | None = None
) -> None:
    """Make sure that `path` is a directory in which a database can live, creating it if need be.

    Leaves the directory marked as ours, durably. Cost: a few fsyncs, about 1 ms.

    Raises InvalidArgument if another place must be chosen (not a directory, somebody else's files,
    a network file system, no way to create files without replacing others), Unavailable if this
    one must be mended (not writable, full). Nothing but empty directories is left behind then.
    """
    if not path or "\0" in path:
        raise InvalidArgument(f"not a path: {path!r}", path=path)
    path = os.path.realpath(path)
    refuse_network(path, environ)
    try:
        os.makedirs(path, exist_ok=True)
        reach("directory.created")
        names = set(os.listdir(path))
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidArgument(f"{path} is not a directory", path=path) from error
    except OSError as error:
        raise _not_usable(path, error) from error
    _refuse_foreign(path, names)
    try:
        _remove_old_probes(path, names, (clock or SystemClock()).now_us())
        _probe(path)
        if MARKER_FILE not in names:
            _mark(path)
    except OSError as error:
        # A store that has got full is opened all the same: to be read, and to delete.
        if not (is_full(error) and CATALOG_FILE in names):
            raise _not_usable(path, error) from error


def network_file_system(path: str, mountinfo: str) -> str | None:
    """The type of the network file system that `path` is on, or None if it is on a local one.

    path: absolute and free of symbolic links; it need not exist.
    mountinfo: the text of `/proc/self/mountinfo`.
    """
    found_length, found_type = -1, ""
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        # Blanks and backslashes are written as octal numbers.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of equal mount points the last one hides the others.
        if inside and len(point) >= found_length:
            found_length, found_type = len(point), after.split(" ", 1)[0]
    return found_type if found_type in NETWORK_FILE_SYSTEMS else None


def refuse_network(path: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises InvalidArgument if `path`, free of symbolic links, is on a network file system."""
    if environ.get(ALLOW_NETWORK_VARIABLE) == "1":
        return
    file_system = _network_file_system_of(path)
    if file_system is not None:
        raise InvalidArgument(
            f"{path} is on a network file system ({file_system}), where SQLite's locks are not "
            "reliable: use a local disk. If only one process ever opens this directory, "
            f"{ALLOW_NETWORK_VARIABLE}=1 allows it.",
            path=path,
            file_system=file_system,
        )


def _network_file_system_of(path: str) -> str | None:
    """The same of this machine's mounts. path: free of symbolic links."""
    try:
        with open(MOUNTINFO_FILE, encoding="utf-8", errors="surrogateescape") as file:
            mountinfo = file.read()
    except FileNotFoundError:
        return None  # Not Linux: no way to tell without a package.
    except OSError as error:
        raise _not_usable(path, error) from error
    return network_file_system(path, mountinfo)


def claim_alone(path: str, environ: Mapping[str, str] = os.environ) -> int | None:
    """On a network file system that is allowed: a descriptor that keeps other processes out.

    None on a local one, where any number may come. Raises Unavailable if another process is in.
    """
    if environ.get(ALLOW_NETWORK_VARIABLE) != "1":
        return None
    path = os.path.realpath(path)
    file_system = _network_file_system_of(path)
    if file_system is None:
        return None
    try:
        descriptor = os.open(
            os.path.join(path, _ALONE_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
    except BlockingIOError as error:
        raise Unavailable(
            f"{path} is on a network file system ({file_system}), where one process may have it "
            "open, and another process has: end that one, or move the directory to a local disk",
            path=path,
        ) from error
    except OSError as error:
        raise _not_usable(path, error) from error
    return descriptor


def _refuse_foreign(path: str, names: set[str]) -> None:
    if CATALOG_FILE in names or MARKER_FILE in names:
        return
    if CHROMA_FILE in names:
        raise InvalidArgument(
            f"{path} is a Chroma database ({CHROMA_FILE}): choose another directory; to move, read "
            "the records out with Chroma and add them here",
            path=path,
        )
    foreign = sorted(
        name for name in names if name not in _NOT_FOREIGN and not name.startswith(_PROBE_PREFIX)
    )
    if foreign:
        examples = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise InvalidArgument(
            f"{path} is not an OchreDB directory and not empty (it has {examples}): choose another "
            "directory",
            path=path,
        )


def _probe(path: str) -> None:
    """Create, sync, publish and remove a file, as the store will.

    If the wall clock is set ahead meanwhile, who starts just then takes the file for an old one and
    removes it: then once more.
    """
    for _ in range(_PROBES_MAX - 1):
        with contextlib.suppress(FileNotFoundError):
            return _probe_once(path)
    return _probe_once(path)


def _probe_once(path: str) -> None:
    source = os.path.join(path, _PROBE_PREFIX + IdSource().uuid7())
    target = source + _PUBLISHED
    try:
        with files.opened(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            files.write_all(descriptor, [memoryview(_MARKER_TEXT)])
            files.sync(descriptor)
        reach("directory.probe-synced")
        files.publish(source, target)
        reach("directory.probe-published")
    finally:
        files.unlink_if_exists(source)
        files.unlink_if_exists(target)
    reach("directory.probe-removed")


def _remove_old_probes(path: str, names: set[str], now_us: int) -> None:
    """Of starts that died in `_probe`; a young one may be of a process that starts just now."""
    for name in names:
        if name.startswith(_PROBE_PREFIX):
            try:
                made_us = uuid7_time_us(name.removeprefix(_PROBE_PREFIX).removesuffix(_PUBLISHED))
            except ValueError:
                continue  # Not one of ours.
            if made_us <= now_us - _PROBE_ABANDONED_US:
                files.unlink_if_exists(os.path.join(path, name))
                reach("directory.old-probe-removed")


def _mark(path: str) -> None:
    """Put the marker in; it counts from the moment that its name exists, whatever its content."""
    marker = os.path.join(path, MARKER_FILE)
    with files.opened(marker, os.O_WRONLY | os.O_CREAT) as descriptor:
        reach("directory.marker-created")
        files.write_all(descriptor, [memoryview(_MARKER_TEXT)])
        files.sync(descriptor)
    reach("directory.marker-synced")
    files.sync_folder(path)
    files.sync_parents(path)
    reach("directory.marked")


def _not_usable(path: str, error: OSError) -> OchreError:
    """The error to raise for one of the operating system's."""
    cause = error.strerror or str(error)
    if error.errno == errno.ENOTSUP:
        return InvalidArgument(f"{path} cannot hold a database: {cause}", path=path)
    if error.errno == errno.EROFS:
        return Unavailable(f"{path} is on a read-only file system", path=path, errno=error.errno)
    if error.errno in {errno.EACCES, errno.EPERM}:
        return Unavailable(f"{path} is not writable for this user: {cause}", path=path)
    if is_full(error):
        return StorageFull(f"{path} is full: {cause}", path=path, errno=error.errno)
    return Unavailable(f"cannot use {path}: {cause}", path=path, errno=error.errno)
