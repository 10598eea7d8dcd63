"""A storm over a cluster: processes killed, PostgreSQL restarted, Redis stopped, S3 failing.

Clients use it meanwhile, and their history is judged (load.py). Afterwards the cluster's own
compactors must drain the tails and collect the garbage, until the bucket holds exactly what the
catalog refers to; every process must end by itself with 0; and an engine that knows nothing of the
cluster must read the same from its catalog and bucket.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .cluster import Cluster
from .load import Judged, Load
from .members import Forks, MemberFailed
from .storage import Storage

QUIET_S_MAX = 90.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """failing: share of requests to S3 that fail, half of them before and half after acting.

    postgres_at, redis_at: when, as shares of the duration, each is restarted or stopped; the first
    restart of PostgreSQL is an orderly one, the others are kill -9.
    """

    duration_s: float
    seed: int
    clients: int = 3
    kill_every_s: float = 1.0
    failing: float = 0.05
    postgres_at: tuple[float, ...] = (0.25, 0.65)
    redis_at: tuple[float, ...] = (0.4, 0.8)
    redis_away_s: float = 3.0


@dataclass
class Report:
    kills: Counter[str] = field(default_factory=Counter)  # By role.
    events: list[str] = field(default_factory=list)
    s3: Counter[str] = field(default_factory=Counter)
    quiet_s: float = 0.0
    objects: int = 0
    judged: Judged = field(default_factory=Judged)

    def summary(self) -> str:
        return "\n".join(
            (
                f"killed {dict(sorted(self.kills.items()))}; {'; '.join(self.events)}",
                f"S3 {dict(sorted(self.s3.items()))}; {self.objects} objects in the bucket"
                f" {self.quiet_s:.1f} s after the last write",
                self.judged.summary(),
            )
        )


class Storm:
    """One run over a started cluster, which is stopped at the end. Files lie in its folder."""

    def __init__(self, cluster: Cluster, launcher: Forks, plan: Plan) -> None:
        self.cluster, self.plan, self.report = cluster, plan, Report()
        self._rng = random.Random(plan.seed)
        self._load = Load(cluster, launcher, seed=plan.seed, clients=plan.clients)
        self._problem = self._load.problems.append

    def run(self) -> Report:
        cluster, plan, load = self.cluster, self.plan, self._load
        faults = cluster.faults
        assert faults is not None
        load.start()
        faults.fail_before = faults.fail_after = plan.failing / 2
        disturbers = [
            threading.Thread(target=self._disturb, args=disturbance)
            for disturbance in (
                (plan.postgres_at, self._restart_postgres),
                (plan.redis_at, self._stop_redis),
            )
        ]
        self._begun_s = time.monotonic()
        for thread in disturbers:
            thread.start()
        self._kill_for_a_while()
        for thread in disturbers:
            thread.join()
        self.report.s3 = Counter(faults.counts)
        faults.fail_before = faults.fail_after = 0.0
        try:
            cluster.wait_ready()
        except MemberFailed as failed:
            self._problem(str(failed))
        load.stop()
        storage = Storage(cluster)
        try:
            self._await_quiet(storage)
            before = load.read_everything()
            try:
                cluster.stop()
            except MemberFailed as failed:
                self._problem(str(failed))
            if load.read_by_another_engine(storage) != before:
                self._problem("an engine that knows nothing of the cluster reads something else")
            if difference := storage.difference():
                self._problem(f"after the end of all processes: {difference}")
            self.report.objects = len(storage.bucket())
            self.report.judged = load.judge(storage)
        finally:
            storage.close()
        return self.report

    def _kill_for_a_while(self) -> None:
        due_s = self._begun_s
        while due_s < self._begun_s + self.plan.duration_s:
            due_s += self.plan.kill_every_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            for text in self.cluster.ended():
                self._problem(text)
            victim = self._rng.choice(list(self.cluster.members.values()))
            self.report.kills[victim.roles] += 1
            self.cluster.kill(victim.name)

    def _disturb(self, shares: tuple[float, ...], act: Callable[[int], str]) -> None:
        for number, share in enumerate(shares):
            due_s = self._begun_s + share * self.plan.duration_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            begun_s = time.monotonic()
            try:
                done = act(number)
            except BaseException as error:
                self._problem(f"the storm itself failed: {error!r}")
                raise
            took_s = time.monotonic() - begun_s
            self.report.events.append(f"{begun_s - self._begun_s:.0f} s: {done} ({took_s:.1f} s)")

    def _restart_postgres(self, number: int) -> str:
        postgres = self.cluster.components.postgres
        if number > 0:
            postgres.kill()
        postgres.restart()
        return "PostgreSQL killed and started" if number > 0 else "PostgreSQL restarted"

    def _stop_redis(self, _number: int) -> str:
        redis = self.cluster.components.redis
        redis.stop()
        time.sleep(self.plan.redis_away_s)
        redis.restart()
        return "Redis stopped and started"

    def _await_quiet(self, storage: Storage) -> None:
        """The cluster's own compactors fold everything and collect what nothing refers to."""
        begun_s = time.monotonic()
        while (difference := storage.difference()) and time.monotonic() < begun_s + QUIET_S_MAX:
            time.sleep(0.5)
        self.report.quiet_s = time.monotonic() - begun_s
        if difference:
            self._problem(f"{QUIET_S_MAX:g} s after the last write: {difference}")
