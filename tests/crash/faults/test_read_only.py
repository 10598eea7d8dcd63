"""A disk that takes no more changes, for whatever reason: reads go on, and all resumes (I12)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import Connect
from .support import Faults, Written, eager_server, process_time_s, temporary_files, wait_until

SIZES = (10, 100_000, 600_000)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_changes_that_fail_under_a_running_server(
    tmp_path: Path, connect: Connect, code: int
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    faults = Faults(tmp_path, data)
    with eager_server(data, tmp_path / "log", environment=faults.environment) as server:
        client = connect(server)
        written = Written(client, client.create("records"))
        for size in SIZES:
            assert written.add(size).status == 201
        written.check()
        faults.changes_fail(code)
        doubtful = []
        for size in SIZES:
            answer = written.add(size)
            assert answer.status == 503, answer
            assert int(answer.headers["retry-after"]) >= 1
            assert "catalog" in answer.body["message"] or str(data) in answer.body["message"]
            doubtful += ["commit" in answer.body["message"]]
        assert not any(doubtful), "known not to have happened"
        assert client.call("DELETE", "collections/records").status == 503
        written.check()
        used = process_time_s(server.pid)
        time.sleep(2)  # Housekeeping and background work meet it, too.
        assert process_time_s(server.pid) - used < 1.0, "background work spins"
        assert faults.refused > 0
        written.check()
        faults.changes_fail(0)
        wait_until(lambda: written.add(10).status == 201, "writes resume")
        for size in SIZES:
            assert written.add(size).status == 201
        written.check()
        wait_until(lambda: temporary_files(data) == [], "nothing half-done stays")
        assert server.stop() == 0
        server.start()
        written.client = connect(server)
        written.check()


def test_permissions_that_are_lost_and_given_back(tmp_path: Path, connect: Connect) -> None:
    """As a user that may not do everything: root without what makes it different."""
    data = tmp_path / "data"
    data.mkdir()
    before = ":"
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("NOT TESTED: root may do everything, and there is no setpriv")
        before = 'exec setpriv --bounding-set -dac_override,-dac_read_search "$@"'
    with eager_server(data, tmp_path / "log", before=before) as server:
        client = connect(server)
        written = Written(client, client.create("records"))
        for size in SIZES:
            assert written.add(size).status == 201
        written.check()
        objects = data / "objects"
        folders = [objects, objects / "tmp", objects / "fragments", data]
        for folder in folders:
            folder.chmod(0o555)
        answer = written.add(600_000)
        assert answer.status == 503
        assert "Permission denied" in answer.body["message"]
        assert str(objects) in answer.body["message"]
        assert written.add(10).status == 201, "needs no new file"
        written.check()
        time.sleep(2)
        written.check()
        for folder in folders:
            folder.chmod(0o755)
        for size in SIZES:
            assert written.add(size).status == 201
        written.check()

        # Nor is a catalog that became read-only before the server's first write lost for ever.
        assert server.stop() == 0
        (data / "ochredb.sqlite3").chmod(0o444)
        server.start()
        written.client = connect(server)
        written.check()
        answer = written.add(10)
        assert answer.status == 503 and "SQLITE_READONLY" in answer.body["message"], answer
        for path in data.glob("ochredb.sqlite3*"):  # What SQLite made since is as its database was.
            path.chmod(0o644)
        wait_until(lambda: written.add(10).status == 201, "writes resume")
        written.check()


def test_a_file_system_that_the_kernel_makes_read_only(tmp_path: Path, connect: Connect) -> None:
    """What ext4 does when the disk fails: nothing acknowledged is lost after a repair."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False)

    made = run("mkfs.ext4", "-q", "-F", image) if shutil.which("mkfs.ext4") else None
    options = "loop,errors=remount-ro"
    if made is None or made.returncode or run("mount", "-o", options, image, disk).returncode:
        pytest.skip("NOT TESTED: no ext4 can be made in a file and mounted here")
    try:
        source = run("findmnt", "-no", "SOURCE", disk).stdout.strip()
        trigger = Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error"
        if not trigger.exists():
            pytest.skip("NOT TESTED: this kernel's ext4 has no trigger_fs_error")
        server = eager_server(disk / "data", tmp_path / "log")
        with server:
            client = connect(server)
            written = Written(client, client.create("records"))
            for size in SIZES:
                assert written.add(size).status == 201
            trigger.write_text("broken by a test")
            for size in SIZES:
                answer = written.add(size)
                assert answer.status == 503, answer
                assert "ead-only file system" in answer.body["message"]
            written.check()
            time.sleep(1)
            written.check()
            server.kill()
        run("umount", disk)
        assert run("fsck.ext4", "-fy", image).returncode in (0, 1)
        assert run("mount", "-o", options, image, disk).returncode == 0
        with server:
            written.client = connect(server)
            written.check()
            assert written.add(10).status == 201
    finally:
        run("umount", "-l", disk)
