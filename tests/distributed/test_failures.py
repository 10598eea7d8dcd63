"""What fails, one after the other, under load: what holds meanwhile, and when service is back.

In each the guarantees hold, and full service returns by itself (trouble.py). What each failure
looks like from outside is in docs/operations.md.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from .cluster import Cluster, Shape
from .members import Forks
from .storage import Storage
from .trouble import all_settled, under_load

SHAPE = Shape(mode="eager", faults=True, proxies=True)
pytestmark = pytest.mark.timeout(300)

# -- PostgreSQL


def test_postgres_is_restarted(cluster: Cluster, launcher: Forks) -> None:
    under_load(cluster, launcher, "pg-restart", cluster.components.postgres.restart)


def test_postgres_is_killed_and_away_for_a_while(cluster: Cluster, launcher: Forks) -> None:
    def trouble() -> None:
        cluster.components.postgres.kill()
        time.sleep(8.0)
        cluster.components.postgres.restart()

    judged = under_load(cluster, launcher, "pg-away", trouble)
    assert judged.statuses[503] + judged.statuses[504] > 0, "nobody noticed"


def test_postgres_is_a_black_hole(cluster: Cluster, launcher: Forks) -> None:
    """Connections stay open and nothing comes: only time-outs help."""
    proxy = cluster.proxies["postgres"]

    def trouble() -> None:
        proxy.silent = True
        time.sleep(10.0)
        proxy.heal()

    under_load(cluster, launcher, "pg-silent", trouble)


def test_postgres_is_far_away(cluster: Cluster, launcher: Forks) -> None:
    proxy = cluster.proxies["postgres"]

    def trouble() -> None:
        proxy.delay_s = 0.02
        time.sleep(5.0)
        proxy.heal()

    judged = under_load(cluster, launcher, "pg-far", trouble)
    assert all_settled(judged, 1), judged.summary()


def test_connections_to_postgres_are_reset(cluster: Cluster, launcher: Forks) -> None:
    proxy = cluster.proxies["postgres"]

    def trouble() -> None:
        proxy.reset_after_bytes = 20_000
        for _ in range(5):
            time.sleep(1.0)
            proxy.cut()
        proxy.heal()
        proxy.cut()

    judged = under_load(cluster, launcher, "pg-reset", trouble)
    assert proxy.counts["resets"] > 0
    assert judged.available("read") >= 0.95, judged.summary()


# -- S3


def test_s3_answers_with_errors_only(cluster: Cluster, launcher: Forks) -> None:
    faults = cluster.faults
    assert faults is not None

    def trouble() -> None:
        faults.fail_before, faults.fail_after = 0.7, 0.3
        time.sleep(8.0)
        faults.fail_before = faults.fail_after = 0.0

    judged = under_load(cluster, launcher, "s3-errors", trouble)
    assert judged.available("read") >= 0.5, judged.summary()  # What is warm or inline goes on.


def test_s3_is_a_black_hole(cluster: Cluster, launcher: Forks) -> None:
    proxy = cluster.proxies["s3"]

    def trouble() -> None:
        proxy.silent = True
        time.sleep(8.0)
        proxy.heal()

    under_load(cluster, launcher, "s3-silent", trouble)


def test_connections_to_s3_are_reset(cluster: Cluster, launcher: Forks) -> None:
    proxy = cluster.proxies["s3"]

    def trouble() -> None:
        proxy.reset_after_bytes = 3_000
        for _ in range(5):
            time.sleep(1.0)
            proxy.cut()
        proxy.heal()

    judged = under_load(cluster, launcher, "s3-reset", trouble)
    assert proxy.counts["resets"] > 0
    assert judged.available("read") >= 0.95, judged.summary()


# -- Redis is a hint: nobody may notice (I11)


def test_redis_is_flushed(cluster: Cluster, launcher: Forks) -> None:
    judged = under_load(cluster, launcher, "redis-flush", cluster.components.redis.flush)
    assert all_settled(judged, 1), judged.summary()


def test_redis_is_away(cluster: Cluster, launcher: Forks) -> None:
    def trouble() -> None:
        cluster.components.redis.kill()
        time.sleep(4.0)
        cluster.components.redis.restart()

    judged = under_load(cluster, launcher, "redis-away", trouble)
    assert all_settled(judged, 1), judged.summary()


def test_redis_is_a_black_hole(cluster: Cluster, launcher: Forks) -> None:
    proxy = cluster.proxies["redis"]

    def trouble() -> None:
        proxy.silent = True
        time.sleep(4.0)
        proxy.heal()

    judged = under_load(cluster, launcher, "redis-silent", trouble)
    assert all_settled(judged, 1), judged.summary()


# -- processes


def test_every_process_is_restarted_in_turn(cluster: Cluster, launcher: Forks) -> None:
    """A rolling restart: no request fails beyond one retry, and every process exits with 0."""

    def trouble() -> None:
        for _name in cluster.rolling_restart():
            time.sleep(0.5)

    judged = under_load(cluster, launcher, "rolling", trouble)
    assert all_settled(judged, 2), judged.summary()


@pytest.mark.parametrize("role", ["frontend", "log", "query", "compactor"])
def test_one_of_two_is_killed(cluster: Cluster, launcher: Forks, role: str) -> None:
    def trouble() -> None:
        member = cluster.of(role)[0]
        member.kill()
        time.sleep(4.0)
        member.start()
        member.wait_ready()

    judged = under_load(cluster, launcher, f"kill-{role}", trouble)
    assert all_settled(judged, 2), judged.summary()


def test_what_was_killed_by_hand_is_started_again(cluster: Cluster) -> None:
    """As `make cluster` does."""
    member = cluster.members["query-0"]
    assert list(cluster.start_ended()) == []
    killed = member.pid
    os.kill(killed, signal.SIGKILL)
    said: list[str] = []
    deadline_s = time.monotonic() + 10
    while not said and time.monotonic() < deadline_s:
        said = list(cluster.start_ended())
        time.sleep(0.05)
    assert said == [f"query-0 ended with -9, started again as pid {member.pid}"]
    assert member.pid != killed
    cluster.wait_ready()


def test_what_is_left_is_what_is_referenced(cluster: Cluster) -> None:
    """Last: after all of that the bucket holds exactly what the catalog refers to."""
    storage = Storage(cluster)
    deadline_s = time.monotonic() + 90
    try:
        while (difference := storage.difference()) and time.monotonic() < deadline_s:
            time.sleep(0.5)
    finally:
        storage.close()
    assert difference == ""
