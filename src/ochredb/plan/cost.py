"""What searching costs, in microseconds of one core, and which way is chosen.

A cost is a count of rows or of candidates times constants of a reference machine (an x86-64 core
with AVX-512, 2 MB of L2 cache; quiet), times what this machine needs as a multiple of it. The
multiples are 1 until `measure` has been run: a server does that once, after its start, in a
background thread. They need only be right enough to order the alternatives: a wrong choice costs
time, never an answer (docs/decisions/0010-measured-costs.md).

    measure(SystemClock())
    scan_us(20_000, 20_000, 128)  # 708.2 on the reference machine
    scan_us(20_000, 20_000, 128, coded=True)  # 207.9
    graph_us(20_000, 128, 100)  # 120.4

The graph's constants were fitted to searches of one query by one thread, M 16 (with M 24 a search
took 1.35 times as long, with M 32 1.8 times):

    labels x d    20k x 128      100k x 128           20k x 768
    ef            100   125      100   200   400      100
    measured us   115   160      280   550   1,100    580
    fitted us     120   149      263   521   1,037    588
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numkong
import numpy as np

from ochredb.clock import Clock
from ochredb.configuration import IndexSettings
from ochredb.parts.calibration import NEAREST
from ochredb.vectors.scan import GATHER_SHARE_MAX, reads_all

# A filtered answer comes from an exact scan up to this cost on the reference machine: filtering a
# graph loses recall. Not scaled, so that answers do not depend on the machine.
FILTERED_SCAN_US_MAX = 8_000.0
# Below this share of matching rows a graph is never asked: most of what it visits would be dropped.
GRAPH_SHARE_MIN = 0.05
# A graph that may miss something is searched with a candidate list longer than `ef_search` by this
# factor: ours is built by several threads and grown, and shall not find less than one built in one
# go.
EF_MARGIN = 1.15
# A list shorter than the default is enough if it was measured to find so much, and a little longer:
# by some hundred queries, to which strangers may be a little harder.
_RECALL_SURE, _SURE_MARGIN = 0.998, 1.25
# How many more candidates than asked for are recomputed exactly, at least.
OVERFETCH_ROWS = 16

# Codes that a loop scans again and again stay in a cache that requests of all kinds share.
_CODES_COLD = 2.0
_LABELS_REFERENCE, _NEIGHBORS_REFERENCE = 20_000, 16
_NEIGHBORS_POWER = 0.8  # Not each of more neighbours is a vector that was not met before.
_SIZE_FACTOR_MIN, _SIZE_FACTOR_MAX = 0.5, 4.0  # All in cache; every access misses it.
_MEASURED_ROWS, _MEASURED_DIMENSION = 65_536, 128  # 32 MB: little of it stays in caches.
_RUN_ROWS = 1_024  # Of a run: 0.04 and 0.1 ms, short enough to be left alone at times.
_RUNS = _MEASURED_ROWS // _RUN_ROWS
_MULTIPLE_MIN, _MULTIPLE_MAX = 0.25, 8.0
# How far the two multiples may be apart. Machines are not; measurements beside other work are.
_APART_MAX = 1.5


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine's time as a multiple of the reference machine's.

    stream: a product with consecutive rows. random: rows from all over memory, gathered or visited
    by a graph search. codes: a product with codes of 8 bits.
    """

    stream: float = 1.0
    random: float = 1.0
    codes: float = 1.0


_machine = Machine()


def machine() -> Machine:
    """The multiples in use."""
    return _machine


def measure(clock: Clock) -> Machine:
    """Measure this machine and use the result from now on.

    The lower quartile of 64 short runs each of a product, a gather and a product of codes, so that
    other work that runs meanwhile hardly shows. Cost: 40 ms and 46 MB, given back.
    """
    global _machine
    ones = np.ones((_RUN_ROWS, _MEASURED_DIMENSION), np.int8)
    coded = [numkong.dots_pack(ones) for _ in range(_RUNS)]
    rows = np.ones((_MEASURED_ROWS, _MEASURED_DIMENSION), np.float32)
    query = np.ones(_MEASURED_DIMENSION, np.float32)
    # A step prime to the number of rows: no row is beside the one before, or in a cache.
    scattered = np.arange(_RUN_ROWS) * 6_151
    times_s = np.empty((_RUNS, 4))
    for run in range(_RUNS):
        first = run * _RUN_ROWS
        block = rows[first : first + _RUN_ROWS]
        picks = (scattered + first) % _MEASURED_ROWS
        times_s[run, 0] = clock.monotonic_s()
        _ = block @ query
        times_s[run, 1] = clock.monotonic_s()
        _ = rows[picks] @ query
        times_s[run, 2] = clock.monotonic_s()
        _ = numkong.dots_packed(ones[:1], coded[run])
        times_s[run, 3] = clock.monotonic_s()
    stream_us, random_us, codes_us = (
        np.quantile(np.diff(times_s, axis=1), 0.25, axis=0) * 1e6
    ).tolist()
    stream = _multiple(stream_us, _everything_us(_RUN_ROWS, _MEASURED_DIMENSION))
    random = _multiple(random_us, _gather_us(_RUN_ROWS, _MEASURED_DIMENSION))
    random = min(max(random, stream / _APART_MAX), stream * _APART_MAX)
    codes = _multiple(codes_us, _codes_us(_RUN_ROWS, _MEASURED_DIMENSION))
    _machine = Machine(stream, random, codes)
    return _machine


def use(measured: Machine) -> None:
    """Use these multiples: `Machine()` are the reference machine's."""
    global _machine
    _machine = measured


def scan_us(matching: int, total: int, dimension: int, *, coded: bool = False) -> float:
    """An exact scan: gather the matching rows, or one product over all, whichever is chosen.

    coded: products over all rows read codes.
    """
    return _scan_us(matching, total, dimension, _machine, coded=coded)


def graph_us(labels: int, dimension: int, ef: int, neighbors: int = _NEIGHBORS_REFERENCE) -> float:
    """One search of a graph with candidate list `ef`; memory latency grows with its size.

    neighbors: of each node (M).
    """
    factor = math.sqrt(labels / _LABELS_REFERENCE)
    factor = min(max(factor, _SIZE_FACTOR_MIN), _SIZE_FACTOR_MAX)
    factor *= math.pow(neighbors / _NEIGHBORS_REFERENCE, _NEIGHBORS_POWER)
    return 5.0 + _machine.random * ef * (0.22 + 0.0073 * dimension) * factor


def list_min(
    settings: IndexSettings, neighbors: int, count: int, enough: tuple[int, float] | None
) -> int:
    """The shortest candidate list for a graph of so many `neighbors` (M) for each node.

    settings: of the collection. count: of results. enough: (ef, recall at 10), the shortest list
        with which its calibration found nearly all; None if none did.

    An `ef_search` that somebody chose is the least. Otherwise it is what finds no less than the
    default would on a graph as it is built by default: for up to ten results `enough`, where that
    is shorter and leaves no doubt; 82 on one that we made denser (M 24).
    """
    ef_search, max_neighbors = settings.ef_search, settings.max_neighbors
    if not settings.ef_search_is_asked:
        if enough is not None and enough[1] >= _RECALL_SURE and count <= NEAREST:
            least = math.ceil(enough[0] * _SURE_MARGIN)
            if least < ef_search:
                return least
        if neighbors > max_neighbors:
            return math.ceil(ef_search * math.sqrt(max_neighbors / neighbors))
    if neighbors > max_neighbors or (enough is not None and enough[0] <= ef_search):
        return ef_search
    return math.ceil(ef_search * EF_MARGIN)


def fetch_count(count: int, share: float) -> int:
    """How many neighbours to ask a graph for, so that `count` survive a filter of this share."""
    return math.ceil((count + OVERFETCH_ROWS) / max(share, 1e-9) * (1.0 if share > 0.999 else 1.2))


def prefers_graph(
    *,
    matching: int,
    total: int,
    labels: int,
    neighbors: int,
    dimension: int,
    count: int,
    ef: int,
    filtered: bool,
    coded: bool = False,
) -> bool:
    """Whether a graph search is the better way to `count` neighbours among `matching` rows.

    coded: as for `scan_us`.
    """
    share = matching / max(1, total)
    if labels == 0 or matching <= count + OVERFETCH_ROWS:
        return False
    if filtered and (
        share < GRAPH_SHARE_MIN
        or _scan_us(matching, total, dimension, Machine(), coded=coded) <= FILTERED_SCAN_US_MAX
    ):
        return False
    asked = max(ef, fetch_count(count, share))
    exact_us = scan_us(matching, total, dimension, coded=coded)
    return graph_us(labels, dimension, asked, neighbors) < exact_us


def _scan_us(matching: int, total: int, dimension: int, machine: Machine, *, coded: bool) -> float:
    if coded and reads_all(matching, total):
        looked_at_us = machine.stream * total * 0.003
        return 25.0 + looked_at_us + _CODES_COLD * machine.codes * _codes_us(total, dimension)
    if matching <= GATHER_SHARE_MAX * total:
        return 25.0 + machine.random * _gather_us(matching, dimension)
    return 25.0 + machine.stream * _everything_us(total, dimension)


def _gather_us(rows: int, dimension: int) -> float:
    return rows * (0.02 + 0.0005 * dimension)


def _everything_us(rows: int, dimension: int) -> float:
    return rows * (0.006 + 0.00022 * dimension)


def _codes_us(rows: int, dimension: int) -> float:
    return rows * 0.000024 * dimension


def _multiple(measured_us: float, reference_us: float) -> float:
    """Their ratio, within what a machine can be; a clock that stands still measures nothing."""
    if measured_us <= 0.0:
        return 1.0
    return min(max(measured_us / reference_us, _MULTIPLE_MIN), _MULTIPLE_MAX)
