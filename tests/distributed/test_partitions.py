"""Partitions between hosts: each process has a network namespace, and nftables drops packets.

In each the guarantees hold, and full service returns by itself (trouble.py). Runs in a namespace of
its own: `make partitions`, or tests/distributed/in_namespace.sh around pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pytest

from tests.components.ceph import CephServer
from tests.components.postgres import PostgresServer
from tests.components.redis import RedisServer
from tests.components.tcp_proxy import TcpProxy

from .cluster import BUCKET, ROLES, Cluster, Components, Shape, components_folder
from .load import Judged
from .members import Forks
from .network import HUB, Network, own_namespace
from .trouble import all_settled, under_load

pytestmark = [
    pytest.mark.skipif(
        not own_namespace(), reason="needs a network of its own: run by make partitions"
    ),
    pytest.mark.timeout(300),
]

LASTS_S = 7.0
CLIENT_TIMEOUT_S = 5.0
# A write may wait for the node that is cut off until that gives up, and then, sent again elsewhere,
# for the lock, until PostgreSQL has given up a session that says nothing: about ten seconds each.
LOCKED_S_MAX = 23.0 if "CI" not in os.environ else 60.0  # There only guarantees are judged.
HOSTS = [f"{role}-{number}" for role in ROLES for number in range(2)]


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.build(HOSTS)


@pytest.fixture(scope="module")
def components(ceph: CephServer, network: Network) -> Iterator[Components]:
    """PostgreSQL speaks to the hosts itself: what it notices of a vanished one is tested too."""
    root = components_folder()
    postgres = PostgresServer.start(root / "postgres", listen_addresses="*")
    with open(postgres.folder / "data" / "pg_hba.conf", "a") as file:
        file.write(f"host all all {network.subnet} trust\n")
    postgres.execute("SELECT pg_reload_conf()")
    redis = RedisServer.start(root / "redis")
    ceph.create_bucket(BUCKET)
    yield Components(root, postgres, ceph, redis)
    redis.stop()
    postgres.stop()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def doors(components: Components) -> Iterator[dict[str, TcpProxy]]:
    """Where hosts reach S3 and Redis, which listen on the hub's loopback address only."""
    urls = {"s3": components.ceph.url, "redis": components.redis.url}
    opened = {}
    for component, url in urls.items():
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        opened[component] = TcpProxy.start([(parts.hostname, parts.port)], host="0.0.0.0")
    yield opened
    for proxy in opened.values():
        proxy.stop()


@pytest.fixture(scope="module")
def hosts(
    components: Components, launcher: Forks, network: Network, doors: dict[str, TcpProxy]
) -> Iterator[Cluster]:
    """A cluster whose processes are on hosts of their own."""
    root = Path(tempfile.mkdtemp(prefix="ochredb-partitions-"))
    ports = {component: door.port for component, door in doors.items()}
    ports["postgres"] = components.postgres.port
    cluster = Cluster(
        components,
        launcher,
        root,
        "partitions",
        Shape(mode="eager"),
        environment_of=lambda name: {"OCHREDB_TEST_NAMESPACE": network.namespace(name)},
        host_of=network.address,
        endpoint_of=lambda component, name: f"{network.hub_address(name)}:{ports[component]}",
    )
    try:
        yield cluster.start()
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
    except BaseException:
        print(f"{cluster.tails()}\nkept: {root}", file=sys.stderr)
        raise
    finally:
        cluster.stop(check=False)


class Partition(Protocol):
    def __call__(self, divide: Callable[[], object], lasts_s: float = LASTS_S) -> Judged: ...


@pytest.fixture
def during(
    request: pytest.FixtureRequest, hosts: Cluster, launcher: Forks, network: Network
) -> Partition:
    """Runs the load, with a partition that its argument makes, for a while."""

    def run(divide: Callable[[], object], lasts_s: float = LASTS_S) -> Judged:
        def trouble() -> None:
            divide()
            time.sleep(lasts_s)
            assert network.heal() > 0, "the partition divided nothing"

        name = re.sub("[^a-z]+", "-", request.node.name.removeprefix("test_"))[:40]
        try:
            return under_load(hosts, launcher, name, trouble, timeout_s=CLIENT_TIMEOUT_S)
        except BaseException:
            print(hosts.tails(), file=sys.stderr)
            raise
        finally:
            network.heal()

    return run


def test_clients_and_a_frontend(during: Partition, network: Network) -> None:
    judged = during(lambda: network.cut(HUB, "frontend-0"))
    assert all_settled(judged, 2), judged.summary()


def test_answers_of_a_frontend_are_lost(during: Partition, network: Network) -> None:
    """What it is asked it does; only a client's repetition with its key can tell."""
    judged = during(lambda: network.drop("frontend-0", HUB))
    assert judged.available("read") >= 0.99, judged.summary()


@pytest.mark.parametrize("role", ["log", "query"])
def test_frontends_and_a_peer(during: Partition, network: Network, role: str) -> None:
    def divide() -> None:
        for frontend in ("frontend-0", "frontend-1"):
            network.cut(frontend, f"{role}-0")

    judged = during(divide)
    assert all_settled(judged, 2), judged.summary()


@pytest.mark.parametrize("role", ["log", "query"])
def test_answers_of_a_peer_are_lost(during: Partition, network: Network, role: str) -> None:
    """A write is done, and its frontend does not learn it: it may be done only once."""

    def divide() -> None:
        for frontend in ("frontend-0", "frontend-1"):
            network.drop(f"{role}-0", frontend)

    judged = during(divide)
    assert all_settled(judged, 2), judged.summary()


def test_a_query_node_and_s3(
    during: Partition, network: Network, doors: dict[str, TcpProxy]
) -> None:
    judged = during(lambda: network.cut("query-0", HUB, port=doors["s3"].port))
    assert judged.available("read") >= 0.99, judged.summary()


def test_everybody_and_s3(during: Partition, network: Network, doors: dict[str, TcpProxy]) -> None:
    def divide() -> None:
        for host in HOSTS:
            network.cut(host, HUB, port=doors["s3"].port)

    during(divide)


def test_a_log_node_and_postgres(
    during: Partition, network: Network, components: Components
) -> None:
    """It may be in a transaction, and hold locks that everybody waits for: not for long."""
    port = components.postgres.port
    judged = during(lambda: network.cut("log-0", HUB, port=port), lasts_s=25.0)
    assert judged.longest_s("write") <= LOCKED_S_MAX, judged.summary()


def test_answers_of_postgres_to_a_log_node_are_lost(
    during: Partition, network: Network, components: Components
) -> None:
    """It commits, and the log node does not learn it."""
    during(lambda: network.drop(HUB, "log-0", from_port=components.postgres.port))


def test_a_compactor_and_postgres(
    during: Partition, network: Network, components: Components
) -> None:
    """Its leases are taken over; when it is back its fences keep it from committing."""
    judged = during(lambda: network.cut("compactor-0", HUB, port=components.postgres.port))
    assert judged.available("read") >= 0.99, judged.summary()


@pytest.mark.parametrize("host", ["log-1", "query-1"])
def test_a_host_is_alone(during: Partition, network: Network, host: str) -> None:
    during(lambda: network.isolate(host))


def test_redis_and_everybody(
    during: Partition, network: Network, doors: dict[str, TcpProxy]
) -> None:
    def divide() -> None:
        for host in HOSTS:
            network.cut(host, HUB, port=doors["redis"].port)

    judged = during(divide)
    assert all_settled(judged, 1), judged.summary()
