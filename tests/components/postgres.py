"""A real PostgreSQL server, with fsync on.

server = PostgresServer.start(tmp_path)
url = server.create_database("mine")
server.kill(); server.restart(); server.stop()
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any, Self

import pytest

from ochredb.testing.server_process import free_port

_USER = "pgtest"  # PostgreSQL refuses to run as root.
_START_S_MAX = 60.0


class PostgresServer:
    """One server on a free loopback port. The superuser is `postgres`; every client is trusted."""

    def __init__(self, folder: Path, programs: Path, settings: dict[str, str]) -> None:
        self.folder, self._programs, self._settings = folder, programs, settings
        self.host, self.port = "127.0.0.1", free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, root: Path, **settings: str) -> Self:
        """Make a cluster in a folder of `root`, and start it. settings: of the server, further.

        Skips the test, with the reason, if there is no PostgreSQL.
        """
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
        program = found[-1] if found else shutil.which("initdb")
        if program is None:
            pytest.skip("NOT TESTED: no PostgreSQL (initdb): install the package postgresql")
        server = cls(root / "postgres", Path(program).parent, settings)
        server._make()
        server.restart()
        return server

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://postgres@{self.host}:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """A new database; returns its URL."""
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE template0 ENCODING UTF8')
        return self.url_of(name)

    def execute(self, text: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, on a connection of its own."""
        import psycopg

        with psycopg.connect(self.url_of(database), autocommit=True) as connection:
            cursor = connection.execute(text.encode())
            return cursor.fetchall() if cursor.description else []

    def standby(self, root: Path) -> PostgresServer:
        """Another server, started, that follows this one."""
        server = PostgresServer(root / "standby", self._programs, self._settings)
        server._make_folder()
        copy = [*server._as_user(), str(self._programs / "pg_basebackup"), "--write-recovery-conf"]
        copy += ["-D", str(server.folder / "data"), "-d", self.url]
        copy += ["--checkpoint=fast", "--no-sync"]
        subprocess.run(copy, check=True, capture_output=True)
        server.restart()
        return server

    def promote(self) -> None:
        """Of a standby: returns when it is a primary."""
        assert self.execute("SELECT pg_promote()") == [(True,)]

    def stop(self) -> None:
        """In good order: open transactions are taken back."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """All of its processes, by SIGKILL."""
        process = self._process
        children = [] if process is None or process.poll() is not None else _children(process.pid)
        self._end(signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def restart(self) -> None:
        """Start it again, on the same port and data; stops it first if it runs."""
        self.stop()
        settings = {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "shared_buffers": "32MB",
            "max_connections": "200",
        } | self._settings
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._as_user(),
                    str(self._programs / "postgres"),
                    "-D",
                    str(self.folder / "data"),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def _make_folder(self) -> None:
        """Of the user that the server runs as.

        Not below a folder of root's alone, as those of pytest are, again at each of its starts.
        """
        if os.geteuid() != 0:
            self.folder.mkdir(parents=True)
            return
        if subprocess.run(["id", _USER], capture_output=True).returncode != 0:
            command = ["useradd", "-r", "-M", "-s", "/usr/sbin/nologin", _USER]
            subprocess.run(command, check=True)
        self.folder = Path(tempfile.mkdtemp(prefix="ochredb-postgres-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        shutil.chown(self.folder, _USER, _USER)

    def _make(self) -> None:
        self._make_folder()
        command = [*self._as_user(), str(self._programs / "initdb")]
        command += ["-D", str(self.folder / "data"), "-U", "postgres", "-A", "trust"]
        command += ["--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
        # Whose order of texts is not that of their bytes.
        command += ["--locale-provider=icu", "--icu-locale=en-US"]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr

    def _as_user(self) -> list[str]:
        if os.geteuid() != 0:
            return []
        return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--init-groups", "--"]

    def _wait(self) -> None:
        import psycopg

        deadline = time.monotonic() + _START_S_MAX
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.Error as error:
                assert self._process is not None
                ended = self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    log = (self.folder / "log").read_text(errors="replace")[-2000:]
                    raise AssertionError(f"PostgreSQL did not start: {error}\n{log}") from error
                time.sleep(0.05)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        process.wait(60)


def _children(parent: int) -> list[int]:
    if sys.platform != "linux":
        return []
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(text) for text in path.read_text().split()]
