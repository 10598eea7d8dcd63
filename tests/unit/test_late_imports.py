"""What the embedded engine never imports: the packages of a cluster, which are an extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLUSTER = (
    "grpc", "google.protobuf", "boto3", "botocore", "psycopg", "redis",
    "kubernetes", "yaml", "http.server", "ochredb.rpc", "ochredb.proto", "ochredb.cluster",
    "ochredb.storage.s3", "ochredb.storage.cached", "ochredb.catalog.postgres",
    "ochredb.hints.redis", "ochredb_node.serve", "ochredb_node.cli",
)  # fmt: skip

PROGRAM = """
import sys
import ochredb

with ochredb.PersistentClient(sys.argv[1]) as client:
    notes = client.create_collection("notes")
    notes.add(ids=["a", "b"], embeddings=[[1.0, 2.0], [2.0, 1.0]], documents=["one", "two"])
    assert notes.query(query_embeddings=[[1.0, 2.0]], n_results=1)["ids"] == [["a"]]
    notes.delete(where_document={"$contains": "two"})
    assert notes.count() == 1
ochredb.EphemeralClient().create_collection("in-memory")
print(*sys.modules)
"""


def test_an_embedded_engine_imports_nothing_of_a_cluster(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "ochredb_node.node" in modules
    assert not modules & set(CLUSTER)
