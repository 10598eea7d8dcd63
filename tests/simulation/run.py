"""One simulation: a seed decides who runs when and what fails; everything is checked.

python -m tests.simulation.run --seeds 10000           # Prints the seeds that found something.
python -m tests.simulation.run --first 17 --seeds 1    # One again, exactly as it was.

Of a simulation whose weather was given in part, `--dialect` and `--routed` give it again.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ochredb.cancel import Cancel
from ochredb.peers import GetRequest
from ochredb.testing.simulation.scheduler import Process, Stuck

from .clients import FIELDS, Client, shows
from .cluster import GRACE_S, LEAP_S_MAX, Cluster, Node, Weather, simulated
from .oracle import Oracle, Value, rows

_OPERATIONS = 30  # Of each client.


@dataclass(frozen=True, slots=True)
class Outcome:
    """digest: of all that happened; equal for equal seeds.

    given: what of the weather was given instead of drawn.
    """

    seed: int
    given: dict[str, Any]
    violations: list[str]
    digest: str
    steps: int
    simulated_s: float
    deadlocks: int
    weather: Weather

    @property
    def again(self) -> str:
        """The command that runs the same simulation."""
        known = {"dialect": "--dialect {}", "routed": "--routed"}
        options = [known[name].format(value) for name, value in self.given.items() if value]
        command = f"python -m tests.simulation.run --first {self.seed} --seeds 1"
        return " ".join([command, *options])


def simulate(seed: int, **weather: Any) -> Outcome:
    """Two to four clients with 30 operations each. Cost: about a tenth of a second.

    weather: what of it is given instead of drawn.
    """
    rng = random.Random(f"simulation {seed}")
    oracle = Oracle()
    cluster = Cluster(seed, replace(Weather.drawn(rng), **weather), oracle)
    gc.disable()  # When it runs is not the seed's decision.
    # Background work that fails is logged, and tried again.
    logging.disable(logging.CRITICAL)
    try:
        with simulated(cluster):
            _run(cluster, rng)
    except Stuck as error:
        oracle.violated(f"stuck: {error}")
    except Exception as error:  # None of the engine's may get here.
        oracle.violated(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()
    return Outcome(
        seed,
        weather,
        oracle.violations,
        cluster.scheduler.digest,
        cluster.scheduler.steps,
        cluster.scheduler.now_s,
        cluster.catalog.deadlocks,
        cluster.weather,
    )


def _run(cluster: Cluster, rng: random.Random) -> None:
    scheduler, oracle, world = cluster.scheduler, cluster.oracle, cluster.world
    faults, cluster.catalog.faults = cluster.catalog.faults, type(cluster.catalog.faults)()
    _do(
        cluster,
        scheduler.process("setup"),
        lambda: cluster.node("setup").namespace.ensure_defaults(),
    )
    cluster.catalog.faults = faults
    _do(cluster, world, lambda: _start(cluster, rng))
    clients = [
        scheduler.spawn(world, Client(cluster, number, _OPERATIONS).run)
        for number in range(rng.randint(2, 4))
    ]
    if cluster.weather.kills:
        scheduler.spawn(world, lambda: cluster.misfortune(rng))
    if cluster.weather.leaps:
        scheduler.spawn(world, lambda: cluster.leap(rng))
    scheduler.run(lambda: bool(oracle.violations) or all(task.is_done for task in clients))
    for task in clients:
        if task.error is not None:
            raise task.error
    if not oracle.violations:
        cluster.heal()
        for process in (world, *(node.process for node in (*cluster.servers, *cluster.workers))):
            scheduler.kill(process)
        _do(cluster, scheduler.process("last"), lambda: _settle(cluster))


def _do(cluster: Cluster, process: Process, work: Callable[[], None]) -> None:
    """One task, to its end."""
    task = cluster.scheduler.spawn(process, work)
    cluster.scheduler.run(lambda: task.is_done)
    if task.error is not None:
        raise task.error


def _start(cluster: Cluster, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        cluster.start_server()
    for _ in range(rng.randint(1, 2)):
        cluster.start_worker()


def _settle(cluster: Cluster) -> None:
    """After everything: nothing is lost, nothing is left over."""
    oracle, node = cluster.oracle, cluster.node("last")
    cluster.scheduler.sleep(2 * LEAP_S_MAX)  # All stamps are past for everybody.
    for truth in oracle.collections.values():
        if not truth.is_dropped:
            expected = rows(truth.states[-1])
            _check_content(oracle, node, truth.id, expected, "before")
            node.compactor.compact_now(truth.id)
            _check_content(oracle, node, truth.id, expected, "after")
    for _ in range(4):
        cluster.scheduler.sleep(2 * GRACE_S)
        node.compactor.collect_now(sweep_orphans=True)
    _check_objects(cluster)


def _check_content(
    oracle: Oracle, node: Node, collection: str, expected: list[tuple[str, Value]], moment: str
) -> None:
    answer = node.query.get(collection, GetRequest(fields=FIELDS), cancel=Cancel(60.0, node.clock))
    if not shows(answer, expected):
        oracle.violated(f"I5: {collection} is another {moment} the last compaction")


def _check_objects(cluster: Cluster) -> None:
    """The store holds what is referred to, by what is there still, and nothing else (I6)."""
    oracle, committed, there = cluster.oracle, cluster.catalog.committed, cluster.objects.keys()
    for (collection,) in committed("SELECT DISTINCT collection FROM object_references"):
        if oracle.collections[collection].is_dropped:
            oracle.violated(f"I6: {collection} was dropped, and still keeps objects")
    kept = {key for (key,) in committed("SELECT key FROM object_references")}
    known = {key for (key,) in committed("SELECT key FROM objects WHERE state != 'swept'")}
    if there - kept:
        oracle.violated(f"I6: left over for ever: {sorted(there - kept)}")
    if kept - there:
        oracle.violated(f"I6: referred to, and not there: {sorted(kept - there)}")
    if known != there:
        oracle.violated(f"I6: rows without objects, or the reverse: {sorted(known ^ there)}")


def main(argv: Sequence[str] | None = None) -> int:
    """argv: the command's arguments; None: those of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--dialect", choices=("postgresql", "sqlite"))
    parser.add_argument("--routed", action="store_true", help="through one another's logs")
    arguments = parser.parse_args(argv)
    given = {"dialect": arguments.dialect, "routed": arguments.routed}
    weather = {name: value for name, value in given.items() if value}
    failed = deadlocks = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        outcome = simulate(seed, **weather)
        deadlocks += outcome.deadlocks
        if outcome.violations:
            failed += 1
            print(f"seed {seed} ({outcome.weather.dialect}): {outcome.violations[0]}", flush=True)
            print(f"again: {outcome.again}", flush=True)
        elif arguments.seeds == 1:
            print(outcome)
    print(f"{arguments.seeds} seeds, {failed} with violations, {deadlocks} deadlocks")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
