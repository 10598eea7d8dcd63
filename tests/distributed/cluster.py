"""A cluster of real processes on this machine: PostgreSQL, Ceph RGW, Redis, two of each role.

    python -m tests.distributed.cluster      one for a person, until ctrl-C (`make cluster`)

Tests get theirs from fixtures (conftest.py): the components are started once, and each cluster is a
deployment of its own on them, a database in PostgreSQL and a prefix in a bucket.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ochredb.testing.server_process import free_port
from tests.components.ceph import CephServer
from tests.components.postgres import PostgresServer
from tests.components.redis import RedisServer
from tests.components.s3_faults import S3Faults
from tests.components.tcp_proxy import TcpProxy

from .members import Commands, Launcher, Member, MemberFailed

ROLES = ("frontend", "log", "query", "compactor")
BUCKET = "ochredb"
_CACHE_BYTES = 256 << 20
_LEFT_S_MAX = 15.0
S = TypeVar("S", PostgresServer, CephServer, RedisServer)


@dataclass
class Components:
    """What clusters stand on; started once."""

    root: Path
    postgres: PostgresServer
    ceph: CephServer
    redis: RedisServer

    @classmethod
    def start(cls, say: Callable[[str], None] = lambda _text: None) -> Self:
        """In the main thread: Ceph ends with the thread that started it."""
        root = components_folder()
        started: list[PostgresServer | CephServer | RedisServer] = []

        def one(kind: type[S], name: str) -> S:
            begun_s = time.monotonic()
            server = kind.start(root / name)
            started.append(server)
            say(f"{name} at {server.url}, up in {time.monotonic() - begun_s:.1f} s")
            return server

        try:
            redis, postgres = one(RedisServer, "redis"), one(PostgresServer, "postgres")
            ceph = one(CephServer, "ceph")
            ceph.create_bucket(BUCKET)
            return cls(root, postgres, ceph, redis)
        except BaseException:
            for server in started:
                server.stop()
            shutil.rmtree(root, ignore_errors=True)
            raise

    def stop(self) -> None:
        for server in (self.redis, self.postgres, self.ceph):
            server.stop()
        shutil.rmtree(self.root, ignore_errors=True)


def components_folder() -> Path:
    """A new one, which PostgreSQL's user can reach, as it could not one of pytest's."""
    root = Path(tempfile.mkdtemp(prefix="ochredb-components-"))
    root.chmod(0o755)
    return root


@dataclass(frozen=True, kw_only=True)
class Shape:
    """each: processes of each role. mode: see process.py. settings: more, for every process.

    faults: whether the processes reach S3 through a proxy that can fail (`Cluster.faults`).
    proxies: whether they reach PostgreSQL, S3 and Redis through one that can delay and reset.
    """

    each: int = 2
    mode: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    faults: bool = False
    proxies: bool = False


class Cluster:
    """Processes of each role, and one address in front of the frontends.

    environment_of: more variables of a process, by its name.
    host_of: the address on which a process listens and is reached, by its name. endpoint_of: where
    a process (its name comes second) reaches a component (postgres, s3, redis) instead of at its
    own address; None: there.
    """

    def __init__(
        self,
        components: Components,
        launcher: Launcher,
        root: Path,
        name: str,
        shape: Shape,
        *,
        environment_of: Callable[[str], Mapping[str, str]] = lambda _name: {},
        host_of: Callable[[str], str] = lambda _name: "127.0.0.1",
        endpoint_of: Callable[[str, str], str | None] = lambda _component, _name: None,
    ) -> None:
        self.components, self.shape, self.name, self.root = components, shape, name, root
        self._launcher = launcher
        self._environment_of = environment_of
        self._host_of, self._endpoint_of = host_of, endpoint_of
        self.catalog_url = ""
        self.object_store_url = f"s3://{BUCKET}/{name}"
        self.faults: S3Faults | None = None
        self.proxies: dict[str, TcpProxy] = {}
        self.members: dict[str, Member] = {}
        self._balancer: TcpProxy | None = None
        self.probe_path = root / "graph-uses"

    # -- life

    def start(self) -> Self:
        """All processes at once, on an empty store. Raises MemberFailed."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.catalog_url = self.components.postgres.create_database(self.name.replace("-", "_"))
        if self.shape.faults:
            self.faults = S3Faults.start(self.components.ceph.url, seed=1)
        if self.shape.proxies:
            for component, url in self._urls().items():
                parts = urlsplit(url)
                assert parts.hostname is not None and parts.port is not None
                self.proxies[component] = TcpProxy.start([(parts.hostname, parts.port)])
        try:
            self._make_members()
            for member in self.members.values():
                member.start()
            self.wait_ready()
            targets = [(member.host, member.port) for member in self.of("frontend")]
            self._balancer = TcpProxy.start(targets)
        except BaseException:
            self.stop(check=False)
            raise
        return self

    def _make_members(self) -> None:
        names = [f"{role}-{number}" for role in ROLES for number in range(self.shape.each)]
        ports = {name: (free_port(), free_port(), free_port()) for name in names}
        nodes = {
            f"OCHREDB_{role.upper()}_NODES": "static:"
            + ",".join(
                f"{name}={self._host_of(name)}:{ports[name][1]}"
                for name in names
                if name.rpartition("-")[0] == role
            )
            for role in ("log", "query", "compactor")
        }
        for name in names:
            role = name.rpartition("-")[0]
            port, rpc_port, health_port = ports[name]
            host = self._host_of(name)
            environment = {
                **self.settings_of(name),
                **nodes,
                "OCHREDB_ROLES": role,
                "OCHREDB_NODE_NAME": name,
                "OCHREDB_PATH": str(self.root / f"{name}.data"),
                "OCHREDB_HOST": host,
                "OCHREDB_PORT": str(port),
                "OCHREDB_RPC_HOST": host,
                "OCHREDB_RPC_PORT": str(rpc_port),
                "OCHREDB_HEALTH_HOST": host,
                "OCHREDB_HEALTH_PORT": str(health_port),
                "OCHREDB_CACHE_PATH": str(self.root / f"{name}.cache"),
                "OCHREDB_CACHE_BYTES": str(_CACHE_BYTES),
                "OCHREDB_INSECURE": "true",
                "OCHREDB_ALLOW_RESET": "true",
                "OCHREDB_TEST_MODE": self.shape.mode,
                "OCHREDB_TEST_PROBE": str(self.probe_path),
                **self.shape.settings,
                **self._environment_of(name),
            }
            log = self.root / f"{name}.log"
            self.members[name] = Member(
                name, role, port, rpc_port, health_port, environment, log, self._launcher, host
            )

    def settings_of(self, name: str) -> dict[str, str]:
        """Where the catalog, the objects and the hints are, as a process of this name sees them."""
        urls = self._urls()
        for component, url in urls.items():
            proxy = self.proxies.get(component)
            there = proxy.address if proxy else self._endpoint_of(component, name)
            if there is not None:
                parts = urlsplit(url)
                user, at, _ = parts.netloc.rpartition("@")
                urls[component] = urlunsplit(parts._replace(netloc=f"{user}{at}{there}"))
        ceph = self.components.ceph
        return {
            "OCHREDB_CATALOG_URL": urls["postgres"],
            "OCHREDB_OBJECT_STORE_URL": self.object_store_url,
            "OCHREDB_S3_ENDPOINT": urls["s3"],
            "OCHREDB_S3_REGION": "us-east-1",
            "OCHREDB_REDIS_URL": urls["redis"],
            "OCHREDB_S3_ACCESS_KEY_ID": ceph.access_key,
            "OCHREDB_S3_SECRET_ACCESS_KEY": ceph.secret_key,
        }

    def _urls(self) -> dict[str, str]:
        components = self.components
        return {
            "postgres": self.catalog_url,
            "s3": self.faults.url if self.faults else components.ceph.url,
            "redis": components.redis.url,
        }

    def stop(self, *, check: bool = True) -> None:
        """SIGTERM to all at once. check: raise MemberFailed if one does not end with 0."""
        problems: list[str] = []
        running = [member for member in self.members.values() if member.pid]
        for member in running:
            member.terminate()
        for member in running:
            try:
                code = member.wait_ended()
            except MemberFailed as failed:
                problems.append(str(failed))
            else:
                if code != 0:
                    problems.append(f"{member.name} ended with {code}\n{member.tail()}")
        if left := self._left_behind():
            problems.append(f"processes ran on {_LEFT_S_MAX:g} s after the end: {left}")
        if self._balancer is not None:
            self._balancer.stop()
        for proxy in self.proxies.values():
            proxy.stop()
        if self.faults is not None:
            self.faults.stop()
        if problems and check:
            raise MemberFailed("\n".join(problems))

    def _left_behind(self) -> list[int]:
        """Workers of processes that are gone must go too; those that do not are killed."""
        deadline_s = time.monotonic() + _LEFT_S_MAX
        while (left := self._processes()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left

    def _processes(self) -> list[int]:
        """Ids of all processes of this cluster, by their environment."""
        mine = f"OCHREDB_PATH={self.root}/".encode()
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                if mine in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        return found

    # -- addresses

    @property
    def url(self) -> str:
        """Each connection to it goes to another frontend."""
        assert self._balancer is not None, "the cluster was not started"
        return f"http://{self._balancer.address}"

    def of(self, role: str) -> list[Member]:
        return [member for member in self.members.values() if member.roles == role]

    # -- what is done to it

    def wait_ready(self, names: Iterable[str] | None = None) -> None:
        for name in names or self.members:
            self.members[name].wait_ready()

    def kill(self, name: str) -> None:
        """kill -9, and start it again; does not wait until it is ready."""
        member = self.members[name]
        member.kill()
        member.start()

    def restart(self, name: str) -> None:
        """SIGTERM, start, wait until it is ready. Raises MemberFailed if it did not exit with 0."""
        member = self.members[name]
        code = member.stop()
        if code != 0:
            raise MemberFailed(f"{name} ended with {code}\n{member.tail()}")
        member.start()
        member.wait_ready()

    def rolling_restart(self) -> Iterator[str]:
        """Restart one after the other; says whose turn it was."""
        for name in list(self.members):
            self.restart(name)
            yield name

    def ended(self) -> list[str]:
        """Processes that have ended by themselves, with their logs."""
        return [
            f"{member.name} ended by itself with {code}\n{member.tail()}"
            for member in self.members.values()
            if (code := member.ended()) is not None
        ]

    def start_ended(self) -> Iterator[str]:
        """Start again what has ended by itself or was killed by hand; says what that was."""
        for member in self.members.values():
            if member.ended() is not None:
                code = member.wait_ended()
                member.start()
                yield f"{member.name} ended with {code}, started again as pid {member.pid}"

    def tails(self) -> str:
        return "\n".join(member.tail() for member in self.members.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Start one, say where it is, wait for ctrl-C, stop it."""
    parser = argparse.ArgumentParser(prog="make cluster", description=main.__doc__)
    parser.add_argument("--each", type=int, default=2, help="processes of each role (default: 2)")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())

    def say(text: str) -> None:
        print(f"cluster: {text}", flush=True)

    say("starting PostgreSQL, Ceph and Redis, about 20 s")
    components = Components.start(say)
    launcher = Commands()
    root = components.root / "cluster"
    cluster = Cluster(components, launcher, root, "cluster", Shape(each=options.each))
    try:
        begun_s = time.monotonic()
        cluster.start()
        say(f"{len(cluster.members)} processes, up in {time.monotonic() - begun_s:.1f} s:")
        for member in cluster.members.values():
            where = member.url if member.is_frontend else member.rpc_address
            say(f"  {member.name:12s} pid {member.pid:7d}  {where}")
        say(f"logs: {root}/*.log")
        say("kill any of them, if you like: it is started again after a second")
        say(f"the REST API is at {cluster.url}; ctrl-C stops everything and deletes it")
        while not ended.wait(1.0):
            for text in cluster.start_ended():
                say(text)
        say("stopping")
        cluster.stop()
    except MemberFailed as failed:
        print(failed, file=sys.stderr)
        return 1
    finally:
        with contextlib.suppress(MemberFailed):
            cluster.stop()
        launcher.close()
        components.stop()
    say("stopped; nothing is left")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
