"""What the tests of faults share: a small disk, a server to break, and a record of what it said."""

from __future__ import annotations

import contextlib
import http.client
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ochredb.testing.server_process import ServerProcess, free_port

DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
_EAGER = str(Path(__file__).with_name("eager_server.py"))
GONE = (OSError, http.client.HTTPException)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own of `size` bytes ("24m"), mounted on a new folder; or a loud skip."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"NOT TESTED, no small file system can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> int:
    """Write a file until the disk is full to the last block; returns its size in bytes."""
    size = 0
    with open(path, "wb", buffering=0) as file:
        for block in (1 << 20, 1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while written := file.write(bytes(block)):
                    size += written
    assert os.statvfs(path).f_bavail == 0
    return size


class Client:
    """One keep-alive connection to a server; not for several threads at once."""

    def __init__(self, port: int, timeout_s: float = 60.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def call(self, method: str, path: str, body: object = None) -> Answer:
        """Raises one of `GONE` if there is no answer."""
        data = None if body is None else json.dumps(body).encode()
        if not path.startswith("/"):
            path = f"{DATABASE}/{path}"
        answer: http.client.HTTPResponse | None = None
        try:
            self._connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            text = answer.read()
        except GONE:
            if answer is not None:
                answer.close()  # It has the socket, if the server said that it closes it.
            self._connection.close()  # The next call connects anew.
            raise
        headers = {name.lower(): value for name, value in answer.getheaders()}
        try:
            return Answer(answer.status, json.loads(text), headers)
        except ValueError:
            return Answer(answer.status, text.decode(errors="replace"), headers)

    def create(self, name: str) -> str:
        answer = self.call("POST", "collections", {"name": name})
        assert answer.status == 200, answer
        return str(answer.body["id"])

    def close(self) -> None:
        self._connection.close()


@dataclass
class Answer:
    """status, parsed body and headers of a response."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Written:
    """The records that a collection must hold: documents by id, of acknowledged writes only."""

    client: Client
    collection: str
    documents: dict[str, str] = field(default_factory=dict)
    unanswered: set[str] = field(default_factory=set)  # Of these, it is not known.
    _count: int = 0

    def add(self, size: int, verb: str = "add") -> Answer:
        """One write of a record with a document of `size` characters."""
        self._count += 1
        name = f"{self.collection[-6:]}-{self._count}"
        document = f"{name} ".ljust(size, "x")
        vector = [float(self._count), float(size % 97)]
        body = {"ids": [name], "embeddings": [vector], "documents": [document]}
        self.unanswered.add(name)
        answer = self.client.call("POST", f"collections/{self.collection}/{verb}", body)
        if answer.status in (200, 201):
            self.documents[name] = document
        if answer.status != 504 and "unknown" not in str(answer.body):
            self.unanswered.remove(name)
        return answer

    def delete(self, name: str) -> Answer:
        path = f"collections/{self.collection}/delete"
        answer = self.client.call("POST", path, {"ids": [name]})
        if answer.status == 200:
            del self.documents[name]
        return answer

    def check(self) -> None:
        """All that was acknowledged, and nothing else, is read, counted and found."""
        path = f"collections/{self.collection}"
        got = self.client.call("POST", f"{path}/get", {"include": ["documents"]})
        assert got.status == 200, got
        found = dict(zip(got.body["ids"], got.body["documents"], strict=True))
        assert found.keys() == self.documents.keys()
        assert found == self.documents
        assert self.client.call("GET", f"{path}/count").body == len(self.documents)
        if self.documents:
            search = {"query_embeddings": [[1.0, 2.0]], "n_results": 1}
            assert self.client.call("POST", f"{path}/query", search).status == 200


def wait_until(true: Callable[[], bool], what: str, limit_s: float = 60.0) -> float:
    """Seconds until it is true; fails if that takes too long."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < limit_s, f"after {limit_s:g} s still not: {what}"
        time.sleep(0.05)
    return time.monotonic() - start


class Faults:
    """The switches of faults.c for one tree; `environment` puts a process under them."""

    SOURCE = Path(__file__).with_name("faults.c")

    def __init__(self, folder: Path, tree: Path) -> None:
        if shutil.which("cc") is None or not os.path.exists("/proc/self/fd"):
            pytest.skip("NOT TESTED: faults.c is written for Linux and needs a C compiler")
        library, control = folder / "faults.so", folder / "faults.control"
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-D_LARGEFILE64_SOURCE"]
        subprocess.run(["cc", *flags, "-o", library, self.SOURCE, "-ldl"], check=True)
        control.write_bytes(bytes(4096))
        with open(control, "r+b") as file:
            self._control = mmap.mmap(file.fileno(), 4096)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAULTS_ROOT": os.path.realpath(tree),
            "FAULTS_CONTROL": str(control),
        }

    def sync_takes(self, seconds: float) -> None:
        self._set(0, int(seconds * 1e6))

    def changes_fail(self, code: int) -> None:
        """With this errno; 0: no more."""
        self._set(1, code)

    def clock_is_off(self, seconds: float) -> None:
        self._set(2, int(seconds * 1e6))

    @property
    def refused(self) -> int:
        """Changes that have failed so far."""
        return int(struct.unpack_from("<q", self._control, 24)[0])

    def _set(self, number: int, value: int) -> None:
        struct.pack_into("<q", self._control, 8 * number, value)


def eager_server(
    data: Path,
    output: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    before: str = ":",
) -> ServerProcess:
    """A server whose background work is due soon, not yet started.

    before: a command of the shell, as `ulimit`, in whose process it runs.
    """
    port = free_port()
    command = [sys.executable, _EAGER, "run", "--path", str(data), "--port", str(port), *options]
    return ServerProcess(
        ["sh", "-c", f'{before}; exec "$@"', "sh", *command], port, output, environment=environment
    )


def process_time_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def temporary_files(data: Path) -> list[Path]:
    folder = data / "objects" / "tmp"
    return list(folder.iterdir()) if folder.exists() else []


def part_files(data: Path) -> list[Path]:
    return [path for path in (data / "objects" / "parts").rglob("*") if path.is_file()]
