"""`ochredb serve` on PostgreSQL and S3: all roles apart, and a start before either is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.components.ceph import CephServer
from tests.components.postgres import PostgresServer

from .served import Served
from .test_serve import fill, free_port, until


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    server = PostgresServer.start(tmp_path_factory.mktemp("postgres"))
    yield server
    server.stop()


class Shared:
    """Processes that share a catalog and a bucket and nothing else."""

    def __init__(self, folder: Path, catalog_url: str, ceph: CephServer, bucket: str) -> None:
        self.folder = folder
        self.environment = {
            "OCHREDB_CATALOG_URL": catalog_url,
            "OCHREDB_OBJECT_STORE_URL": f"s3://{bucket}/prefix",
            "OCHREDB_S3_ENDPOINT": ceph.url,
            "OCHREDB_S3_ACCESS_KEY_ID": ceph.access_key,
            "OCHREDB_S3_SECRET_ACCESS_KEY": ceph.secret_key,
        }
        self.processes: list[Served] = []

    def start(self, roles: str, *arguments: str, **environment: str) -> Served:
        return self.launch(roles, *arguments, **environment).ready()

    def launch(self, roles: str, *arguments: str, **environment: str) -> Served:
        """Without waiting for it."""
        number = len(self.processes)
        given = ("--roles", roles, "--path", str(self.folder / f"{number}"), *arguments)
        served = Served(
            self.folder / f"{number}-{roles}.log", *given,
            environment={**self.environment, **environment},
        )  # fmt: skip
        self.processes.append(served)
        return served


@pytest.fixture
def shared(
    tmp_path: Path, postgres: PostgresServer, ceph: CephServer, bucket: str
) -> Iterator[Shared]:
    name = "c" + bucket.replace("-", "_")
    one = Shared(tmp_path, postgres.create_database(name), ceph, bucket)
    yield one
    for served in one.processes:
        served.kill()


def test_all_roles_apart(shared: Shared) -> None:
    log, query = shared.start("log"), shared.start("query")
    shared.start("compactor", "--compactor-workers", "1")
    nodes = ("--log-nodes", f"static:l={log.rpc}", "--query-nodes", f"static:q={query.rpc}")
    frontend = shared.start("frontend", *nodes)
    path = fill(frontend, "shared", 9_000)
    assert frontend.call("GET", f"{path}/count") == 9_000
    near = {"query_embeddings": [[7.2, 1.0]], "n_results": 2, "where": {"even": False}}
    assert frontend.call("POST", f"{path}/query", near)["ids"] == [["r7", "r9"]]
    until(lambda: frontend.call("GET", f"{path}/indexing_status")["num_unindexed_ops"] == 0)
    assert frontend.call("POST", f"{path}/query", near)["ids"] == [["r7", "r9"]]
    assert not list(shared.folder.glob("*/ochredb.sqlite3")), "nothing is kept here but copies"
    for served in shared.processes:
        assert served.stop() == 0, served.log_path.read_text()
        assert "Traceback" not in served.log_path.read_text()


def test_another_catalog_of_the_same_bucket_is_refused(
    shared: Shared, postgres: PostgresServer
) -> None:
    """Its sweep would delete all objects of the first. Both places are named, no password is."""
    shared.start("query").stop()
    other = postgres.create_database("other").replace("@", ":s3cret@", 1)
    with pytest.raises(AssertionError) as caught:
        shared.start("query", OCHREDB_CATALOG_URL=other)
    message = str(caught.value)
    assert "belongs to store" in message and "its objects in bucket" in message
    assert "s3cret" not in message


def test_a_process_waits_for_its_catalog(shared: Shared, postgres: PostgresServer) -> None:
    """Alive and not ready meanwhile; a worker too."""
    postgres.stop()
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    try:
        served = shared.launch("query,compactor", "--health-port", port)
        until(lambda: _status(f"{url}/healthz") == 200)
        until(lambda: "not ready, tried again" in served.log_path.read_text())
        assert _status(f"{url}/readyz") == 503
    finally:
        postgres.restart()
    served.ready()
    assert _status(f"{url}/readyz") == 200
    until(lambda: served.metric("ochredb_compactor_workers") >= 1)
    assert served.stop() == 0, served.log_path.read_text()


@pytest.mark.parametrize("away", ["OCHREDB_CATALOG_URL", "OCHREDB_S3_ENDPOINT"])
def test_a_signal_ends_the_wait(shared: Shared, away: str) -> None:
    scheme = "http" if away.endswith("ENDPOINT") else "postgresql"
    port, nobody = str(free_port()), f"{scheme}://127.0.0.1:{free_port()}"
    nowhere = {away: nobody if scheme == "http" else f"{nobody}/none"}
    served = shared.launch("query", "--health-port", port, **nowhere)
    until(lambda: _status(f"http://127.0.0.1:{port}/healthz") == 200)
    time.sleep(3)
    begun_s = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - begun_s < 10, "not when the attempt ends, after half a minute"
    assert "Traceback" not in served.log_path.read_text()


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, trust_env=False).status_code
    except httpx.ConnectError:
        return None
