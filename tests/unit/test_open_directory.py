"""Which directories are taken, which are refused, and in what words."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from ochredb import crash_points
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.ids import IdSource
from ochredb.storage import files, open_directory
from ochredb.storage.open_directory import check_directory, network_file_system
from ochredb_node.node import Node, NodeConfig

from .kernel import ManualClock

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system at a new folder: mount("tmpfs", "size=64k") -> its path."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: mounting file systems needs root")
    points: list[Path] = []

    def mount_one(kind: str, options: str, source: str = "none") -> Path:
        point = tmp_path / f"mount-{len(points)}"
        point.mkdir()
        command = ["mount", "-t", kind, "-o", options, source, str(point)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"NOT TESTED: cannot mount {kind} here: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount_one
    for point in reversed(points):
        subprocess.run(["umount", str(point)], check=True)


def test_a_new_directory_is_made_and_marked(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    for _ in range(3):
        check_directory(str(path))
        assert os.listdir(path) == ["ochredb.txt"]
    assert "OchreDB database" in (path / "ochredb.txt").read_text()


def test_the_mark_comes_first_and_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    check_directory(str(tmp_path / "a" / "b"))
    assert synced[1:5] == [
        f"{tmp_path}/a/b/ochredb.txt", f"{tmp_path}/a/b", f"{tmp_path}/a", f"{tmp_path}",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ochredb.txt", "ochredb.sqlite3"])
def test_our_own_directory_is_taken_whatever_else_is_in_it(tmp_path: Path, name: str) -> None:
    for other in (name, "objects", "ochredb.sqlite3-wal", "something"):
        (tmp_path / other).touch()
    check_directory(str(tmp_path))


def test_traces_of_a_crash_during_the_first_start_are_no_foreign_files(tmp_path: Path) -> None:
    (tmp_path / ".ochredb-probe-0190").touch()
    check_directory(str(tmp_path))
    assert (tmp_path / "ochredb.txt").exists()


def test_probes_of_dead_starts_are_removed_when_nobody_can_be_using_them(tmp_path: Path) -> None:
    ids = IdSource()
    check_directory(str(tmp_path))
    probes = {f".ochredb-probe-{ids.uuid7()}", f".ochredb-probe-{ids.uuid7()}-published"}
    others = {".ochredb-probe-of-somebody-else", "ochredb.txt"}
    for name in probes | others:
        (tmp_path / name).touch()
    check_directory(str(tmp_path))
    assert set(os.listdir(tmp_path)) == probes | others
    clock = ManualClock()
    clock.advance(601)
    check_directory(str(tmp_path), clock=clock)
    assert set(os.listdir(tmp_path)) == others


def test_a_start_goes_on_if_the_clock_is_set_ahead_and_another_start_removes_its_probe(
    tmp_path: Path,
) -> None:
    """Found by a storm whose clock leapt by hours: a process failed at its start."""
    check_directory(str(tmp_path))
    later = ManualClock()
    later.advance(3_600)
    removed = 0

    def another_starts(point: str) -> None:
        nonlocal removed
        if point == "directory.probe-synced" and removed < 2:
            removed += 1
            crash_points.observe(None)
            check_directory(str(tmp_path), clock=later)
            crash_points.observe(another_starts)

    crash_points.observe(another_starts)
    try:
        check_directory(str(tmp_path))
    finally:
        crash_points.observe(None)
    assert removed == 2
    assert os.listdir(tmp_path) == ["ochredb.txt"]


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_directory(str(tmp_path / "link"))
    assert os.listdir(tmp_path / "target") == ["ochredb.txt"]


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="not a path"):
        check_directory(path)


@pytest.mark.parametrize("below", ["", "/a", "/a/b"])
def test_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidArgument, match="is not a directory"):
        check_directory(f"{tmp_path}/file{below}")
    assert (tmp_path / "file").read_text() == "mine"


def test_foreign_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.tex", "photo.jpg", "a", "b"):
        (tmp_path / name).touch()
    with pytest.raises(InvalidArgument, match=re.escape("not empty (it has a, b, photo.jpg, …)")):
        check_directory(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "photo.jpg", "thesis.tex"]


def test_a_chroma_directory_is_named(tmp_path: Path) -> None:
    for name in ("chroma.sqlite3", "0e4c9d4e-5b0f-4a57-8f0c-000000000000"):
        (tmp_path / name).touch()
    with pytest.raises(InvalidArgument, match="is a Chroma database"):
        check_directory(str(tmp_path))
    assert len(os.listdir(tmp_path)) == 2


def test_a_read_only_file_system(mount: Mount) -> None:
    point = mount("tmpfs", "size=64k")
    check_directory(str(point))
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    with pytest.raises(Unavailable, match="read-only file system"):
        check_directory(str(point))
    with pytest.raises(Unavailable, match="read-only file system"):
        check_directory(f"{point}/new")


def test_a_full_file_system(mount: Mount) -> None:
    point = mount("tmpfs", "size=64k")
    check_directory(str(point))
    filler = os.open(point / "ochredb.filler", os.O_WRONLY | os.O_CREAT)
    while os.statvfs(point).f_bfree:
        os.write(filler, b"x" * 4096)
    os.close(filler)
    names = sorted(os.listdir(point))
    with pytest.raises(Unavailable, match="is full: No space left"):
        check_directory(str(point))
    assert sorted(os.listdir(point)) == names


def test_a_fresh_volume_is_empty(mount: Mount, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    point = mount("ext4", "loop", str(image))
    assert os.listdir(point) == ["lost+found"]
    check_directory(str(point))
    assert sorted(os.listdir(point)) == ["lost+found", "ochredb.txt"]


def test_a_directory_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    if os.geteuid() != 0:
        with pytest.raises(Unavailable, match="not writable"):
            check_directory(f"{tmp_path}/theirs")
        return
    # Permissions do not bind root: ask as somebody else.
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        os.chmod(folder, os.stat(folder).st_mode | 0o055)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setuid(65534)
            for below in ("", "/new"):
                try:
                    check_directory(f"{tmp_path}/theirs{below}")
                except Unavailable as error:
                    code = 0 if "not writable" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.listdir(tmp_path / "theirs") == []


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    check_directory(str(tmp_path / "with-renameat2"))
    monkeypatch.setattr(files, "_libc", lambda: object())
    with pytest.raises(InvalidArgument, match="neither hard links nor renameat2"):
        check_directory(str(tmp_path / "with-neither"))
    assert os.listdir(tmp_path / "with-neither") == []


MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /home rw - nfs4 server:/export/home rw,vers=4.2
31 30 8:1 / /home/local rw - xfs /dev/sda1 rw
32 22 0:41 / /mnt/with\\040blank rw - fuse.sshfs host:/ rw
33 22 0:42 / /mnt/hidden rw - cifs //server/share rw
34 22 0:43 / /mnt/hidden rw - tmpfs none rw
35 22 0:44 / /mnt/host rw - 9p host rw
malformed
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", None),
        ("/var/lib/ochredb", None),
        ("/home", "nfs4"),
        ("/home/me/not/there/yet", "nfs4"),
        ("/homestead", None),
        ("/home/local", None),
        ("/home/local/db", None),
        ("/mnt/with blank/db", "fuse.sshfs"),
        ("/mnt/hidden/db", None),
        ("/mnt/host", "9p"),
    ],
)
def test_network_file_systems_are_recognised(path: str, expected: str | None) -> None:
    assert network_file_system(path, MOUNTINFO) == expected


def test_a_network_file_system_is_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path}/net rw - nfs4 x rw\n")
    monkeypatch.setattr(open_directory, "MOUNTINFO_FILE", str(mountinfo))
    path = f"{tmp_path}/net/db"
    for environ in ({}, {"OCHREDB_ALLOW_NETWORK_FS": "0"}):
        with pytest.raises(InvalidArgument, match=r"network file system \(nfs4\)"):
            check_directory(path, environ)
    assert not os.path.exists(f"{tmp_path}/net")
    check_directory(path, {"OCHREDB_ALLOW_NETWORK_FS": "1"})
    check_directory(f"{tmp_path}/local", {})


def test_on_an_allowed_network_file_system_one_process_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path}/net rw - nfs4 x rw\n")
    monkeypatch.setattr(open_directory, "MOUNTINFO_FILE", str(mountinfo))
    monkeypatch.setenv("OCHREDB_ALLOW_NETWORK_FS", "1")
    path = f"{tmp_path}/net/db"
    first, second = Node(NodeConfig(path=path)), Node(NodeConfig(path=path))
    first.start(background=False)
    with pytest.raises(Unavailable, match=r"\(nfs4\), where one process may have it open"):
        second.start(background=False)
    first.close()
    second.start(background=False)
    second.close()
    others = [Node(NodeConfig(path=f"{tmp_path}/local")) for _ in range(2)]
    for node in others:
        node.start(background=False)
    for node in others:
        node.close()


def test_this_machine_lists_its_mounts(tmp_path: Path, mount: Mount) -> None:
    """The format is the kernel's: a mount made now is found in it, blank and all."""
    point = mount("tmpfs", "size=64k")
    (point / "a b").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", f"{point}/a b"], check=True)
    try:
        with open(open_directory.MOUNTINFO_FILE) as file:
            text = file.read().replace("- tmpfs none", "- nfs none")
        assert network_file_system(f"{point}/a b/c", text) == "nfs"
        assert network_file_system(str(tmp_path / "x"), text) is None
    finally:
        subprocess.run(["umount", f"{point}/a b"], check=True)
