"""`ochredb serve` as real processes on one SQLite directory: roles apart, signals, workers."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import ochredb
from ochredb.clock import SystemClock
from ochredb.rpc.channel import channel
from ochredb.rpc.compactor_client import CompactorClient
from ochredb.rpc.config import RpcConfig
from ochredb.testing.server_process import free_port
from tests.components.certificates import Authority

from .served import PROGRAM, Served

EAGER = ("--gc-grace-s", "20", "--deadline-s", "10")


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.05)
    return found


class Cluster:
    """Processes on one directory, each with a log file; those that still run are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.processes: list[Served] = []

    def start(self, roles: str, *arguments: str, **environment: str) -> Served:
        return self.launch(roles, *arguments, **environment).ready()

    def launch(self, roles: str, *arguments: str, **environment: str) -> Served:
        """Without waiting for it."""
        log_path = self.folder / f"{len(self.processes)}-{roles}.log"
        given = ("--roles", roles, "--path", str(self.data), *arguments)
        served = Served(log_path, *given, environment=environment)
        self.processes.append(served)
        return served

    def frontend(self, log: Served, query: Served, *arguments: str, **environment: str) -> Served:
        nodes = ("--log-nodes", f"static:l={log.rpc}", "--query-nodes", f"static:q={query.rpc}")
        return self.start("frontend", *nodes, *arguments, **environment)

    def close(self) -> None:
        for served in self.processes:
            served.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    one = Cluster(tmp_path)
    yield one
    one.close()
    for log in tmp_path.glob("*.log"):
        text = log.read_text()
        assert "Traceback" not in text and "Fatal" not in text, text


def fill(frontend: Served, name: str, rows: int) -> str:
    """A collection of points on a line, with documents and metadata; its path."""
    made = frontend.call("POST", "/collections", {"name": name})
    path = f"/collections/{made['id']}"
    body = {
        "ids": [f"r{number}" for number in range(rows)],
        "embeddings": [[float(number), 1.0] for number in range(rows)],
        "documents": [f"number {number}" for number in range(rows)],
        "metadatas": [{"even": number % 2 == 0} for number in range(rows)],
    }
    frontend.call("POST", f"{path}/add", body)
    return path


def test_every_role_in_a_process_of_its_own(cluster: Cluster) -> None:
    log, query = cluster.start("log"), cluster.start("query")
    compactor = cluster.start("compactor", "--compactor-workers", "1")
    frontend = cluster.frontend(log, query)
    assert (frontend.rpc, log.rest, frontend.roles) == (None, None, "frontend")
    path = fill(frontend, "all", 9_000)
    assert frontend.call("GET", f"{path}/count") == 9_000
    near = {"query_embeddings": [[7.2, 1.0]], "n_results": 2, "where": {"even": False}}
    assert frontend.call("POST", f"{path}/query", near)["ids"] == [["r7", "r9"]]
    deletion = {"where_document": {"$contains": "number 89"}}
    assert frontend.call("POST", f"{path}/delete", deletion)["deleted"] == 111
    assert frontend.call("GET", f"{path}/count") == 8_889
    status = until(
        lambda: (
            (found := frontend.call("GET", f"{path}/indexing_status"))["num_unindexed_ops"] == 0
            and found
        )
    )
    assert status["num_indexed_ops"] == 9_111, "a worker process folded it"
    assert frontend.call("POST", f"{path}/query", near)["ids"] == [["r7", "r9"]]
    assert compactor.metric("ochredb_compactor_workers") == 1
    made = frontend.call("POST", "/collections", {"name": "wide"})
    wide = [[float(row % 97), *[float(row)] * 127] for row in range(6_000)]
    body = {"ids": [f"w{row}" for row in range(6_000)], "embeddings": wide}
    frontend.call("POST", f"/collections/{made['id']}/add", body)
    until(lambda: compactor.metric("ochredb_graph_insertions_total") == 6_000)
    assert frontend.metric("ochredb_peer_circuits_open") == 0
    for served in cluster.processes:
        assert served.is_ready()
        assert served.metric("ochredb_ready") == 1
        assert served.stop() == 0, served.log_path.read_text()
    assert "compactor worker" not in compactor.log_path.read_text(), "it ended well, too"


def test_roles_together_are_called_directly(cluster: Cluster) -> None:
    """A frontend with the log in its own process and the queries in another."""
    query = cluster.start("query")
    front = cluster.start("frontend,log", "--query-nodes", f"static:q={query.rpc}")
    path = fill(front, "two", 50)
    assert front.call("GET", f"{path}/count") == 50
    assert front.rpc is not None
    assert [one.stop() for one in (front, query)] == [0, 0]


def test_a_peer_in_the_same_process_is_called_directly_whatever_lists_of_nodes_say(
    cluster: Cluster,
) -> None:
    """As of one configuration for all processes: here nobody listens where it says."""
    mine, other = free_port(), free_port()
    served = cluster.start(
        "frontend,log,query", "--node-name", "me",
        "--log-nodes", f"static:me=127.0.0.1:{mine},other=127.0.0.1:{other}",
        "--query-nodes", f"static:me=127.0.0.1:{mine},other=127.0.0.1:{other}",
    )  # fmt: skip
    path = fill(served, "direct", 50)
    assert served.call("GET", f"{path}/count") == 50
    assert served.metric("ochredb_peer_repeats_total") == 0
    assert served.stop() == 0


def test_all_roles_in_one_process_and_what_it_wrote_in_a_server(cluster: Cluster) -> None:
    served = cluster.start("frontend,log,query,compactor", "--compactor-workers", "0")
    path = fill(served, "one", 50)
    assert served.stop() == 0
    again = cluster.start("frontend,log,query,compactor")
    assert again.call("GET", f"{path}/count") == 50
    assert again.stop() == 0


def test_a_frontend_waits_for_nobody_and_finds_peers_that_come_later(cluster: Cluster) -> None:
    log_port, query_port = free_port(), free_port()
    nodes = (
        "--log-nodes", f"static:l=127.0.0.1:{log_port}",
        "--query-nodes", f"static:q=127.0.0.1:{query_port}",
    )  # fmt: skip
    frontend = cluster.start("frontend", *nodes, "--deadline-s", "2")
    made = frontend.call("POST", "/collections", {"name": "early"})
    count = f"/api/v2/tenants/default_tenant/databases/default_database/collections/{made['id']}"
    assert frontend.http.get(f"{count}/count").status_code in (503, 504)
    assert frontend.metric("ochredb_peer_repeats_total") > 0
    assert frontend.metric("ochredb_peer_circuits_open") >= 1
    cluster.start("query", "--rpc-port", str(query_port))
    until(lambda: frontend.http.get(f"{count}/count").status_code == 200)
    cluster.start("log", "--rpc-port", str(log_port))
    body = {"ids": ["a"], "embeddings": [[1.0]]}
    until(lambda: frontend.http.post(f"{count}/add", json=body).status_code == 201)
    assert frontend.call("GET", f"/collections/{made['id']}/count") == 1


def test_commands_that_take_a_url_take_that_of_a_frontend(cluster: Cluster, tmp_path: Path) -> None:
    """It has neither logs nor queries nor compaction of its own."""
    log, query = cluster.start("log"), cluster.start("query")
    frontend = cluster.frontend(log, query, *EAGER, OCHREDB_TOKEN="s3cret")
    frontend.http.headers["X-Chroma-Token"] = "s3cret"
    path = fill(frontend, "numbers", 300)
    frontend.call("POST", f"{path}/delete", {"ids": [f"r{number}" for number in range(100)]})
    url, target = str(frontend.rest), str(tmp_path / "backup")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True,
            timeout=60, env={**os.environ, "OCHREDB_TOKEN": "s3cret"},
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    assert "Nearest" in run("explain", url, "numbers", "--like", "r107", "--n-results", "1")
    run("backup", url, target)
    restored = str(tmp_path / "restored")
    run("restore", target, restored)
    with ochredb.PersistentClient(restored) as client:
        assert client.get_collection("numbers").count() == 200
    run("check", url)
    assert "numbers" not in run("quarantine", "list", url)
    run("vacuum", url, "--purge")
    assert frontend.call("GET", f"{path}/count") == 200
    status = frontend.call("GET", f"{path}/indexing_status")
    assert status["num_unindexed_ops"] == 0


def test_a_wrong_token_between_processes_is_told(cluster: Cluster) -> None:
    log, query = cluster.start("log"), cluster.start("query", OCHREDB_RPC_TOKEN="right")
    wrong = cluster.frontend(log, query, OCHREDB_RPC_TOKEN="wrong")
    made = wrong.call("POST", "/collections", {"name": "some"})
    count = f"/api/v2/tenants/default_tenant/databases/default_database/collections/{made['id']}"
    refused = wrong.http.get(f"{count}/count")
    assert (refused.status_code, "token" in refused.text) == (503, True), refused.text
    right = cluster.frontend(log, query, OCHREDB_RPC_TOKEN="right")
    assert right.call("GET", f"/collections/{made['id']}/count") == 0


def test_certificates_between_processes(cluster: Cluster, tmp_path: Path) -> None:
    ours = Authority.make(tmp_path / "ours")
    certificate, key = ours.certificate("node", "IP:127.0.0.1")
    tls = (
        "--rpc-tls-ca-path", ours.ca, "--rpc-tls-cert-path", certificate,
        "--rpc-tls-key-path", key,
    )  # fmt: skip
    node = cluster.start("log,query", *tls)
    frontend = cluster.frontend(node, node, *tls)
    path = fill(frontend, "secret", 20)
    assert frontend.call("GET", f"{path}/count") == 20
    bare = cluster.frontend(node, node, "--rpc-tls-ca-path", ours.ca, "--deadline-s", "2")
    url = f"/api/v2/tenants/default_tenant/databases/default_database{path}/count"
    assert bare.http.get(url).status_code in (503, 504), "without a certificate of its own"


def test_certificates_are_renewed_while_processes_run(cluster: Cluster, tmp_path: Path) -> None:
    """Of another authority, so that who goes on with the old ones is understood by nobody."""
    before, after = (Authority.make(tmp_path / name) for name in ("before", "after"))
    files = [str(tmp_path / name) for name in ("ca.pem", "node.pem", "node.key")]

    def install(authority: Authority) -> None:
        for source, target in zip(
            (authority.ca, *authority.certificate("node", "IP:127.0.0.1")), files, strict=True
        ):
            shutil.copy(source, target + ".new")
            os.replace(target + ".new", target)

    install(before)
    tls = (
        "--rpc-tls-ca-path", files[0], "--rpc-tls-cert-path", files[1],
        "--rpc-tls-key-path", files[2],
    )  # fmt: skip
    node = cluster.start("log,query", *tls)
    frontend = cluster.frontend(node, node, *tls)
    path = fill(frontend, "secret", 20)
    assert frontend.call("GET", f"{path}/count") == 20
    install(after)
    until(lambda: "connections to other processes are made anew" in frontend.log_path.read_text())
    assert node.rpc is not None
    assert node.stop() == 0
    cluster.start("log,query", "--rpc-port", node.rpc.rpartition(":")[2], *tls)
    assert frontend.call("GET", f"{path}/count") == 20
    assert frontend.call("POST", f"{path}/delete", {"ids": ["r1"]})["deleted"] == 1


class TestEnd:
    """SIGTERM and SIGINT: not ready at once, nothing new, what runs is finished, status 0."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_write_that_runs_is_finished(self, cluster: Cluster, number: signal.Signals) -> None:
        log, query = cluster.start("log"), cluster.start("query")
        frontend = cluster.frontend(log, query)
        path = fill(frontend, "held", 1)
        url = f"{frontend.rest}/api/v2/tenants/default_tenant/databases/default_database{path}/add"
        body = {"ids": ["late"], "embeddings": [[1.0, 2.0]]}
        with open(cluster.data / "write.lock", "r+b") as lock, ThreadPoolExecutor() as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)  # No write gets through.
            write = pool.submit(httpx.post, url, json=body, timeout=60, trust_env=False)
            time.sleep(0.5)
            for served in (frontend, log):
                served.signal(number)
            until(lambda: not frontend.is_ready() and not log.is_ready())
            until(lambda: not _accepts(str(frontend.rest)))
            assert frontend.process.poll() is None and log.process.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert write.result().status_code == 201
        assert (frontend.wait(), log.wait()) == (0, 0), log.log_path.read_text()
        assert cluster.frontend(cluster.start("log"), query).call("GET", f"{path}/count") == 2

    @pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.2])
    def test_a_signal_during_the_start(self, cluster: Cluster, after_s: float) -> None:
        port = str(free_port())
        served = cluster.launch(
            "frontend,log,query,compactor", "--compactor-workers", "1", "--health-port", port
        )
        until(lambda: _accepts(f"http://127.0.0.1:{port}"))
        time.sleep(after_s)
        assert served.stop() == 0, served.log_path.read_text()

    def test_it_does_not_wait_for_ever(self, cluster: Cluster) -> None:
        served = cluster.start(
            "frontend,log,query,compactor", "--compactor-workers", "0", "--drain-timeout-s", "1"
        )
        path = fill(served, "held", 1)
        url = f"{served.rest}/api/v2/tenants/default_tenant/databases/default_database{path}/count"
        # A client that has sent half a request.
        with socket.create_connection(_address(url)) as client:
            client.sendall(b"GET /api/v2/heartbeat HTTP/1.1\r\nHost: x\r\n")
            time.sleep(0.2)
            begun_s = time.monotonic()
            served.signal(signal.SIGTERM)
            assert served.wait(20) == 0
            assert time.monotonic() - begun_s < 10

    def test_a_second_signal_ends_at_once(self, cluster: Cluster) -> None:
        served = cluster.start("frontend,log,query,compactor", "--compactor-workers", "0")
        path = fill(served, "held", 1)
        url = f"{served.rest}/api/v2/tenants/default_tenant/databases/default_database{path}/add"
        body = {"ids": ["late"], "embeddings": [[1.0, 2.0]]}
        with open(cluster.data / "write.lock", "r+b") as lock, ThreadPoolExecutor() as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write = pool.submit(httpx.post, url, json=body, timeout=60, trust_env=False)
            time.sleep(0.5)
            served.signal(signal.SIGTERM)
            until(lambda: not served.is_ready())
            served.signal(signal.SIGTERM)
            assert served.wait(5) == 128 + signal.SIGTERM
            assert isinstance(write.exception(), httpx.HTTPError)


class TestWorkers:
    """Processes that compact for a compactor."""

    def workers(self, served: Served) -> list[psutil.Process]:
        return list(psutil.Process(served.process.pid).children())

    def test_a_killed_one_is_replaced_and_work_goes_on(self, cluster: Cluster) -> None:
        served = cluster.start("frontend,log,query,compactor", "--compactor-workers", "2")
        first = until(lambda: len(found := self.workers(served)) == 2 and found)
        first[0].kill()
        until(lambda: served.metric("ochredb_compactor_worker_restarts_total") == 1)
        until(lambda: len(self.workers(served)) == 2)
        path = fill(served, "folded", 9_000)
        until(lambda: served.call("GET", f"{path}/indexing_status")["num_unindexed_ops"] == 0)
        workers = self.workers(served)
        assert served.stop() == 0, served.log_path.read_text()
        assert not [one for one in workers if one.is_running()]
        assert "compactor worker" in served.log_path.read_text()

    def test_operators_reach_them_through_their_parent(self, cluster: Cluster) -> None:
        served = cluster.start("frontend,log,query,compactor", "--compactor-workers", "2")
        config = RpcConfig()
        client = CompactorClient(channel(str(served.rpc), config), config, clock=SystemClock())
        client.pause()
        assert client.status().paused
        until(lambda: len(self.workers(served)) == 2)
        self.workers(served)[0].kill()  # Its successor is told, too.
        path = fill(served, "paused", 9_000)
        until(lambda: served.metric("ochredb_compactor_worker_restarts_total") == 1)
        until(lambda: len(self.workers(served)) == 2)
        time.sleep(3)
        (tail,) = client.status().tails
        assert tail.tail_rows == 9_000
        client.compact_now(tail.collection)
        assert client.status().tails == []
        fill(served, "more", 9_000)
        client.resume()
        assert not client.status().paused
        until(lambda: client.status().tails == [])
        assert served.call("GET", f"{path}/count") == 9_000
        client.close()
        assert served.stop() == 0, served.log_path.read_text()

    def test_they_end_with_a_parent_that_was_killed(self, cluster: Cluster) -> None:
        served = cluster.start("compactor", "--compactor-workers", "2")
        workers = until(lambda: len(found := self.workers(served)) == 2 and found)
        served.kill()
        psutil.wait_procs(workers, timeout=20)
        assert not [one for one in workers if one.is_running()]


def test_failed_starts_say_why_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        data = str(tmp_path / "data")
        taken_text = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        for arguments, status, reason in (
            (("--path", str(file)), 2, str(file)),
            (("--path", data, "--port", port), 1, f"ochredb: host, port: {taken_text}"),
            (("--path", data, "--roles", "query", "--rpc-port", port), 1,
             f"rpc_host, rpc_port: {taken_text}"),
            (("--path", data, "--roles", "query", "--health-port", port), 1,
             f"ochredb: health_host, health_port: {taken_text}"),
            (("--roles", "frontend"), 2, "roles has frontend but not log"),
            (("--roles", "frontend", "--log-nodes", "static:a=h:1", "--query-nodes", "static:a=h:1",
              "--insecure"), 2, "log_nodes names other machines"),
        ):  # fmt: skip
            done = subprocess.run(
                [
                    sys.executable, "-c", PROGRAM, "serve", "--compactor-workers", "0", "--port",
                    "0", "--rpc-port", "0", "--health-port", "0", *arguments,
                ],
                capture_output=True, text=True, timeout=60, cwd=tmp_path,
                env={name: text for name, text in os.environ.items() if "OCHREDB_" not in name},
            )  # fmt: skip
            assert (done.returncode, done.stdout) == (status, ""), done.stderr
            assert done.stderr.startswith("ochredb: ") and reason in done.stderr
            assert "Traceback" not in done.stderr


def _accepts(url: str) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection(_address(url)).close()
    except ConnectionRefusedError:
        return False
    return True


def _address(url: str) -> tuple[str, int]:
    parts = httpx.URL(url)
    assert parts.port is not None
    return parts.host, parts.port
