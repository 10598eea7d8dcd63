"""One live `ochredb run` per test session, for every test of the wire.

The server is shared: a test takes collections of its own and leaves the others' alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from ochredb.testing.server_process import ServerProcess, ochredb_server

# These run in environments of their own, started by test_official_clients.py.
collect_ignore = ["official", "js"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A running server on a free port, with an empty directory; it must end with 0 on SIGTERM."""
    running = ochredb_server(tmp_path_factory.mktemp("live") / "data", "--allow-reset")
    with running:
        yield running
    assert running.returncode == 0, running.output_tail()


@pytest.fixture
def collection_name() -> str:
    """A name that no other test uses."""
    return f"test-{uuid.uuid4().hex}"
