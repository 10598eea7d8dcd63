"""One process's connections to Redis. Whatever Redis does, no caller waits long and none fails.

* Nothing on the way of a request connects or resolves a name: a thread of the link makes the
  connections, and who finds none that is idle does without.
* What is sent is queued, and dropped when the queue is full.
* After any failure Redis is left alone for about a second, with jitter: every caller does without
  at once. A server that answers slowly counts as one that fails.

What comes back may be nonsense; who asked must be able to tell.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ochredb.clock import Clock
from ochredb.errors import InvalidArgument

if TYPE_CHECKING:
    import redis

log = logging.getLogger("ochredb.hints")

T = TypeVar("T")

_BATCH_ENTRIES, _BATCH_BYTES = 256, 4 << 20  # Of what is queued, sent at once.
_READ_BYTES = 1 << 20
_SLOW = 5.0  # A call that took so many times its timeout, receiving in pieces, counts as failed.
_CLOSE_WAIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """url: redis://[user[:password]@]host[:port][/db], rediss:// or unix://; it holds secrets.

    timeout_s: of each wait within a request; patience_s: of connecting, and in the background.
    left_alone_s: after a failure Redis is not asked for this long, half as much more or less.
    """

    url: str = field(repr=False)
    timeout_s: float = 0.02
    patience_s: float = 1.0
    left_alone_s: float = 1.0
    connections_max: int = 8  # For requests; in use at the same time.
    queue_entries_max: int = 10_000
    queue_bytes_max: int = 32 << 20

    def __post_init__(self) -> None:
        if not self.url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("redis_url must begin with redis://, rediss:// or unix://")
        for name in ("timeout_s", "patience_s", "left_alone_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.connections_max < 1 or self.queue_entries_max < 1 or self.queue_bytes_max < 1:
            raise ValueError("connections_max, queue_entries_max, queue_bytes_max: at least 1")


class RedisLink:
    """Thread-safe. `start` returns at once, whether Redis is there or not.

    prefix: of every key and channel of this store. dropped, failures: counted since the start.
    """

    def __init__(
        self, config: RedisConfig, store_id: str, clock: Clock, rng: random.Random
    ) -> None:
        """Raises InvalidArgument without the package, or for a URL that is none."""
        self.config, self.prefix = config, f"ochredb:{store_id}:"
        self._clock, self._rng = clock, rng
        self._redis = _package()
        self._patient = self._client(config.patience_s)
        self._changed = threading.Condition()
        self._queue: OrderedDict[str, tuple[int, Callable[[Any], object]]] = OrderedDict()
        self._queue_bytes = 0
        self._idle: list[redis.Redis] = []
        self._made = 0  # Connections for requests, idle or in use.
        self._wanted = 1
        self._left_alone_until_s = 0.0
        self._is_failing = self._closed = False
        self._thread: threading.Thread | None = None
        self.dropped = self.failures = 0

    def _client(self, timeout_s: float, **more: Any) -> redis.Redis:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        try:
            client: redis.Redis = self._redis.Redis.from_url(
                self.config.url,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=timeout_s,
                socket_connect_timeout=self.config.patience_s,
                socket_read_size=_READ_BYTES,
                **more,
            )
        except ValueError as error:
            raise InvalidArgument(f"redis_url is not valid: {error}") from error
        return client

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ochredb-redis", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """What is still queued is dropped. Idempotent."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_WAIT_S)
            self._thread = None
        self._let_go()
        self._patient.close()

    @property
    def is_left_alone(self) -> bool:
        """Whether a failure was so recent that Redis is not asked."""
        return self._clock.monotonic_s() < self._left_alone_until_s

    def later(self, key: str, size_bytes: int, write: Callable[[Any], object]) -> None:
        """Have `write` called with a pipeline, in a thread of the link; at once or never.

        key: what is queued under the same one is replaced. Cost: 2 µs.
        """
        with self._changed:
            if self._closed or self.is_left_alone:
                return
            replaced = self._queue.get(key)
            size = self._queue_bytes + size_bytes - (replaced[0] if replaced else 0)
            full = replaced is None and len(self._queue) >= self.config.queue_entries_max
            if full or size > self.config.queue_bytes_max:
                self.dropped += 1
                return
            self._queue[key] = (size_bytes, write)
            self._queue_bytes = size
            self._changed.notify()

    def ask(self, question: Callable[[redis.Redis], T]) -> T | None:
        """The answer; None if Redis is not at hand, fails or takes too long. Within a request."""
        client = self._take()
        if client is None:
            return None
        begun_s = self._clock.monotonic_s()
        try:
            answer = question(client)
            taken_s = self._clock.monotonic_s() - begun_s
            if taken_s > _SLOW * self.config.timeout_s:
                raise TimeoutError(f"an answer took {taken_s:.3f} s")
        except Exception as error:  # Nonsense may make the client fail in any way.
            self._discard(client)
            self.failed(error)
            return None
        self._put_back(client)
        self._is_failing = False
        return answer

    def ask_patiently(self, question: Callable[[redis.Redis], T]) -> T | None:
        """The same in a background thread, with more patience; it may connect."""
        if self._closed or self.is_left_alone:
            return None
        try:
            answer = question(self._patient)
        except Exception as error:
            self.failed(error)
            return None
        self._is_failing = False
        return answer

    @contextlib.contextmanager
    def listening(self) -> Iterator[redis.client.PubSub]:
        """A subscriber with a connection of its own, which notices when the other end is gone."""
        client = self._client(self.config.patience_s, health_check_interval=10)
        subscriber: redis.client.PubSub = client.pubsub(  # type: ignore[no-untyped-call]
            ignore_subscribe_messages=True
        )
        try:
            yield subscriber
        finally:
            subscriber.close()
            client.close()

    def pause_s(self) -> float:
        """How long to leave Redis alone; other processes will wait for another time."""
        return self.config.left_alone_s * self._rng.uniform(0.5, 1.5)

    def failed(self, error: BaseException) -> None:
        """Leave Redis alone for a while. Told once in the log, until it answers again."""
        with self._changed:
            self.failures += 1
            self._left_alone_until_s = self._clock.monotonic_s() + self.pause_s()
            self._queue.clear()
            self._queue_bytes = 0
            self._wanted = 1
            told, self._is_failing = self._is_failing, True
        self._let_go()
        if not told and not self._closed:
            log.warning("Redis is not of use now, and done without: %s", _named(error))

    # -- connections for requests

    def _take(self) -> redis.Redis | None:
        with self._changed:
            if self._closed or self.is_left_alone:
                return None
            if self._idle:
                return self._idle.pop()
            self._wanted = min(self._made + 1, self.config.connections_max)
            self._changed.notify()
            return None

    def _put_back(self, client: redis.Redis) -> None:
        with self._changed:
            if not self._closed and not self.is_left_alone:
                self._idle.append(client)
                return
        self._discard(client)

    def _discard(self, client: redis.Redis) -> None:
        with self._changed:
            self._made -= 1
        with contextlib.suppress(Exception):  # It is of no use any more, whatever it says.
            client.close()

    def _let_go(self) -> None:
        """Of all that are idle: after a failure they are suspect."""
        with self._changed:
            idle, self._idle = self._idle, []
        for client in idle:
            self._discard(client)

    # -- the link's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, None)
                if self._closed:
                    return
                wait_s = self._left_alone_until_s - self._clock.monotonic_s()
                if wait_s > 0:
                    self._changed.wait_for(lambda: self._closed, wait_s)
                    continue
            try:
                if self._made < self._wanted:
                    self._connect()
                self._send(self._batch())
                self._is_failing = False
            except Exception as error:
                self.failed(error)

    def _has_work(self) -> bool:
        return self._closed or bool(self._queue) or self._made < self._wanted

    def _connect(self) -> None:
        client = self._client(self.config.timeout_s, single_connection_client=True)
        with self._changed:
            self._made += 1
        self._put_back(client)

    def _batch(self) -> list[Callable[[Any], object]]:
        batch: list[Callable[[Any], object]] = []
        size = 0
        with self._changed:
            while self._queue and len(batch) < _BATCH_ENTRIES and size < _BATCH_BYTES:
                _, (size_bytes, write) = self._queue.popitem(last=False)
                size += size_bytes
                self._queue_bytes -= size_bytes
                batch.append(write)
        return batch

    def _send(self, batch: list[Callable[[Any], object]]) -> None:
        if batch:
            pipeline = self._patient.pipeline(transaction=False)
            for write in batch:
                write(pipeline)
            pipeline.execute()


def _package() -> Any:
    try:
        import redis
    except ImportError as error:
        raise InvalidArgument(
            "redis_url is set, but the package redis is missing: install ochredb[cluster]"
        ) from error
    return redis


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
