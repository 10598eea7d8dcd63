"""`ochredb serve` on PostgreSQL and S3: all roles apart, and a start before either is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ochredb.testing.server_process import free_port
from tests.components.ceph import CephServer
from tests.components.postgres import PostgresServer

from .served import PROGRAM, Served
from .test_serve import fill, until


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


def test_objects_are_encrypted_behind_a_private_authority(
    shared: Shared, ceph: CephServer, bucket: str
) -> None:
    """All by settings: TLS to the endpoint, and the key that it encrypts with."""
    shared.environment |= {
        "OCHREDB_S3_ENDPOINT": ceph.tls_url,
        "OCHREDB_S3_CA_PATH": ceph.authority.ca,
        "OCHREDB_S3_ENCRYPTION": "aws:kms",
        "OCHREDB_S3_KMS_KEY_ID": ceph.kms_key,
    }
    served = shared.start("frontend,log,query,compactor", "--compactor-workers", "0")
    path = fill(served, "secret", 9_000)
    until(lambda: served.call("GET", f"{path}/indexing_status")["num_unindexed_ops"] == 0)
    client = ceph.client(tls=True)
    keys = [item["Key"] for item in ceph.client().list_objects_v2(Bucket=bucket)["Contents"]]
    assert any(key.startswith("prefix/parts/") for key in keys)
    found = [client.head_object(Bucket=bucket, Key=key) for key in keys]
    assert {one.get("SSEKMSKeyId") for one in found} == {ceph.kms_key}
    assert served.stop() == 0
    again = shared.start("frontend,log,query,compactor", "--compactor-workers", "0")
    assert again.call("GET", f"{path}/count") == 9_000
    assert again.stop() == 0


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


@pytest.mark.parametrize("roles", ["query", "compactor"])
@pytest.mark.parametrize(
    ("setting", "text", "why"),
    [
        ("CATALOG_URL", "/none", 'catalog_url: .*database "none" does not exist'),
        ("OBJECT_STORE_URL", "s3://no-such-bucket/prefix", "object_store_url: .*no such bucket"),
        ("S3_SECRET_ACCESS_KEY", "hush", "s3_secret_access_key: .*the secret key is wrong"),
        ("S3_ENDPOINT", "https", "s3_ca_path: .*CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_a_setting_that_waiting_does_not_help_ends_the_start(
    shared: Shared, ceph: CephServer, setting: str, text: str, why: str, roles: str
) -> None:
    """With the status of a wrong setting."""
    name = f"OCHREDB_{setting}"
    if text.startswith("/"):
        text = shared.environment[name].rpartition("/")[0] + text
    if text == "https":
        text = ceph.tls_url
    served = shared.launch(roles, **{name: text})
    assert served.wait() == 2
    log = served.log_path.read_text()
    assert re.search(f"^ochredb: {why}", log, re.MULTILINE), log
    assert "Traceback" not in log and "hush" not in log


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


@pytest.mark.timeout(300)  # Nine processes, one after the other.
def test_a_damaged_index_in_the_bucket_is_repaired_through_a_frontend(
    shared: Shared, ceph: CephServer, bucket: str
) -> None:
    """By the frontend's own compactor, under the same leases; records are left and named."""
    log, query = shared.start("log"), shared.start("query")
    shared.start("compactor", "--compactor-workers", "1")
    nodes = ("--log-nodes", f"static:l={log.rpc}", "--query-nodes", f"static:q={query.rpc}")
    frontend = shared.start("frontend", *nodes, OCHREDB_TOKEN="s3cret")
    frontend.http.headers["X-Chroma-Token"] = "s3cret"
    path = fill(frontend, "shared", 9_000)
    until(lambda: frontend.call("GET", f"{path}/indexing_status")["num_unindexed_ops"] == 0)
    assert "undamaged" in _command(0, "check", str(frontend.rest)).stdout
    key = _damage(ceph, bucket, -1_000)
    assert f"damaged: {key}" in _command(1, "check", str(frontend.rest)).stderr
    told = _command(0, "repair", str(frontend.rest)).stdout
    assert re.search(f"^built anew: {key}: block . fails its checksum", told), told
    assert "undamaged" in _command(0, "check", str(frontend.rest)).stdout
    near = {"query_embeddings": [[7.2, 1.0]], "n_results": 2, "where": {"even": False}}
    assert frontend.call("POST", f"{path}/query", near)["ids"] == [["r7", "r9"]]
    assert frontend.call("GET", f"{path}/count") == 9_000
    key = _damage(ceph, bucket, 1_000)
    told = _command(1, "repair", str(frontend.rest)).stdout
    assert f"left: {key}: " in told and "restore a backup" in told
    assert "is for a directory" in _command(2, "repair", str(frontend.rest), "--accept-loss").stderr


@pytest.mark.timeout(300)
def test_a_query_node_has_a_damaged_index_built_anew(
    shared: Shared, ceph: CephServer, bucket: str
) -> None:
    log = shared.start("log")
    compactor = shared.start("compactor", "--compactor-workers", "1")
    query = shared.start("query", "--compactor-nodes", f"static:c={compactor.rpc}")
    nodes = ("--log-nodes", f"static:l={log.rpc}", "--query-nodes", f"static:q={query.rpc}")
    frontend = shared.start("frontend", *nodes)
    path = fill(frontend, "shared", 9_000)
    until(lambda: frontend.call("GET", f"{path}/indexing_status")["num_unindexed_ops"] == 0)
    key = _damage(ceph, bucket, -1_000)
    near = {"query_embeddings": [[7.2, 1.0]], "n_results": 2}
    some = {"where_document": {"$contains": "number 77"}, "limit": 3}
    assert frontend.call("POST", f"{path}/query", near)["ids"] == [["r7", "r8"]]
    ids = frontend.call("POST", f"{path}/get", some)["ids"]
    assert frontend.call("POST", f"{path}/get", {"ids": ["r3"]})["ids"] == ["r3"]
    until(lambda: "has been built anew" in query.log_path.read_text())
    assert _newest_part(ceph, bucket) != key
    assert frontend.call("POST", f"{path}/query", near)["ids"] == [["r7", "r8"]]
    assert frontend.call("POST", f"{path}/get", some)["ids"] == ids


def _newest_part(ceph: CephServer, bucket: str) -> str:
    found = ceph.client().list_objects_v2(Bucket=bucket, Prefix="prefix/parts/")["Contents"]
    return str(max(item["Key"] for item in found)).removeprefix("prefix/")


def _damage(ceph: CephServer, bucket: str, at: int) -> str:
    """Of the one object of the newest part, which begins with records and ends with indexes."""
    client, key = ceph.client(), _newest_part(ceph, bucket)
    place = {"Bucket": bucket, "Key": f"prefix/{key}"}
    whole = client.get_object(**place)
    content = bytearray(whole["Body"].read())
    content[at] ^= 1
    client.put_object(**place, Body=bytes(content), Metadata=whole["Metadata"])
    return key


def _command(status: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True,
        timeout=60, env={**os.environ, "OCHREDB_TOKEN": "s3cret"},
    )  # fmt: skip
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    return done
