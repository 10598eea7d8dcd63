"""Components once per run, forks of one preloaded process, and a cluster for each test module.

A module says what its cluster is like with `SHAPE = Shape(...)`. When a test fails, the ends of all
logs are printed and the files are kept.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.components.ceph import CephServer
from tests.components.postgres import PostgresServer
from tests.components.redis import RedisServer

from .cluster import BUCKET, Cluster, Components, Shape, components_folder
from .members import Forks

_numbers = itertools.count()
_failed: set[str] = set()  # Modules.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        _failed.add(item.nodeid.partition("::")[0])
    return report


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


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server for the module, that is small: one that was killed syncs all of its files before it
    serves again. Who stops it starts it again."""
    server = PostgresServer.start(tmp_path_factory.mktemp("postgres"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def components(ceph: CephServer) -> Iterator[Components]:
    """Who stops one of them starts it again."""
    root = components_folder()
    postgres = PostgresServer.start(root / "postgres")
    redis = RedisServer.start(root / "redis")
    ceph.create_bucket(BUCKET)
    yield Components(root, postgres, ceph, redis)
    redis.stop()
    postgres.stop()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(str(tmp_path_factory.mktemp("nursery") / "log"))
    yield forks
    forks.close()


@contextlib.contextmanager
def running(
    components: Components, launcher: Forks, name: str, shape: Shape, module: str
) -> Iterator[Cluster]:
    """A started cluster. Its logs are shown if a test of the module has failed by its end."""
    root = Path(tempfile.mkdtemp(prefix=f"ochredb-{name}-"))
    made = Cluster(components, launcher, root, name, shape)
    try:
        yield made.start()
        made.stop()
    except BaseException:
        _failed.add(module)
        raise
    finally:
        made.stop(check=False)
        if module in _failed:
            print(f"{made.tails()}\nkept: {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, components: Components, launcher: Forks
) -> Iterator[Cluster]:
    name = re.sub("[^a-z0-9]+", "-", request.module.__name__.rpartition(".")[2].lower())
    shape: Shape = getattr(request.module, "SHAPE", Shape())
    with running(components, launcher, name, shape, request.node.nodeid) as made:
        yield made
