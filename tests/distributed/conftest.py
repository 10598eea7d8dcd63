"""Components that tests share: each is started once by a test process that needs it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.components.ceph import CephServer

_numbers = itertools.count()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephServer]:
    """Who kills it starts it again."""
    server = CephServer.start(tmp_path_factory.mktemp("ceph"))
    yield server
    server.kill()


@pytest.fixture
def bucket(ceph: CephServer) -> str:
    """A new one."""
    return ceph.create_bucket(f"bucket-{next(_numbers)}")
