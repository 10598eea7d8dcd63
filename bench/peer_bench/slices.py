"""One timed piece of a phase on one server: threads with a connection each, and their figures."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from .http_client import Connection, check
from .servers import Server

Latencies = list[float]
Worker = Callable[[Connection, int, Latencies], None]  # connection, thread number, seconds out
BACK_PRESSURE_PAUSE_S = 0.05


class Slice:
    """Sums up the slices of one phase on one server."""

    def __init__(self) -> None:
        self.latencies_s: Latencies = []
        self.rates: list[float] = []  # Operations per second, one per slice.
        self.bodies: dict[int, bytes] = {}  # Request number -> an answer, for recall.
        self.wall_s = self.server_cpu_s = self.client_cpu_s = 0.0
        self.drain_s = 0.0  # Untimed wait for background work, whose CPU is in server_cpu_s.
        self.count = 0

    def add(
        self,
        latencies_s: Latencies,
        wall_s: float,
        server_cpu_s: float,
        client_cpu_s: float,
        count: int | None = None,
    ) -> None:
        """Add one slice; `count` operations, by default one per latency."""
        done = len(latencies_s) if count is None else count
        self.latencies_s += latencies_s
        self.rates.append(done / wall_s)
        self.wall_s += wall_s
        self.server_cpu_s += server_cpu_s
        self.client_cpu_s += client_cpu_s
        self.count += done

    def percentile_ms(self, percent: float) -> float:
        if not self.latencies_s:
            return float("nan")
        return float(np.percentile(self.latencies_s, percent)) * 1e3


def client_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_threads(
    server: Server, threads: int, worker: Worker
) -> tuple[Latencies, float, float, float]:
    """Run `worker` in so many threads; return latencies, and wall, server, client CPU seconds."""
    latencies: list[Latencies] = [[] for _ in range(threads)]
    errors: list[Exception] = []
    connections = [Connection(server.url).open() for _ in range(threads)]

    def guarded(number: int) -> None:
        try:
            worker(connections[number], number, latencies[number])
        except Exception as error:  # Raised again below, in the thread that asked.
            errors.append(error)

    server_s, client_s, start_s = server.cpu(), client_cpu(), time.perf_counter()
    if threads == 1:
        guarded(0)
    else:
        running = [threading.Thread(target=guarded, args=(t,)) for t in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    wall_s = time.perf_counter() - start_s
    server_s, client_s = server.cpu() - server_s, client_cpu() - client_s
    for connection in connections:
        connection.close()
    if errors:
        raise errors[0]
    return [one for some in latencies for one in some], wall_s, server_s, client_s


def send_all(requests: Sequence[bytes], refused_s: Latencies | None = None) -> Worker:
    """Return a worker whose threads together send every request once.

    A 429 is repeated after a pause, which is part of the request's latency; `refused_s` gets the
    time of each, so that its length says how many there were.
    """
    waiting, lock = iter(requests), threading.Lock()

    def worker(connection: Connection, _: int, latencies_s: Latencies) -> None:
        while True:
            with lock:
                request = next(waiting, None)
            if request is None:
                return
            start_s = time.perf_counter()
            while (answer := connection.send(request))[0] == 429:
                if refused_s is not None:
                    refused_s.append(time.perf_counter())
                time.sleep(BACK_PRESSURE_PAUSE_S)
            latencies_s.append(time.perf_counter() - start_s)
            check(*answer, "write")

    return worker


def repeat(
    requests: Sequence[bytes], seconds: float, keep: dict[int, bytes] | None, offset: int = 0
) -> Worker:
    """Return a worker that cycles over the requests for so long; `keep` collects an answer each."""
    end_s = time.perf_counter() + seconds
    n = len(requests)

    def worker(connection: Connection, number: int, latencies_s: Latencies) -> None:
        i = (offset + number * 131) % n  # Threads and slices start at different requests.
        clock = time.perf_counter
        while (start_s := clock()) < end_s:
            status, body = connection.send(requests[i])
            latencies_s.append(clock() - start_s)
            check(status, body, "request")
            if keep is not None and i not in keep:
                keep[i] = body
            i = (i + 1) % n

    return worker


def paced(
    connection: Connection,
    requests: Sequence[bytes],
    rate: float,
    start_s: float,
    seconds: float,
    latencies_s: Latencies,
    answers_s: Latencies,
) -> tuple[int, int]:
    """Send at a fixed rate (open loop); return how many were answered, and how many in error.

    Request k is due at start_s + k / rate. `latencies_s` count from the due time, and a request
    still unsent at the end has waited that long at least; `answers_s` count from the send.
    """
    clock, end_s, errors = time.perf_counter, start_s + seconds, 0
    for k in range(int(rate * seconds)):
        due_s = start_s + k / rate
        now_s = clock()
        if now_s < due_s:
            if due_s - now_s > 2e-4:
                time.sleep(due_s - now_s - 1e-4)
            while (now_s := clock()) < due_s:
                pass
        if now_s >= end_s:
            latencies_s.append(end_s - due_s)
            continue
        status, _ = connection.send(requests[k % len(requests)])
        done_s = clock()
        latencies_s.append(done_s - due_s)
        answers_s.append(done_s - now_s)
        errors += status >= 300
    return len(answers_s), errors
