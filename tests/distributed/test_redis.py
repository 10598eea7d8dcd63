"""Hints, hot bytes and limits on a real Redis that comes and goes, and on liars (I11)."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ochredb.clock import SystemClock
from ochredb.errors import Exhausted, InvalidArgument
from ochredb.hints.base import Hint, HintKind, Listener
from ochredb.hints.hot import RedisHotFragments
from ochredb.hints.limits import LimitsConfig, SharedLimits
from ochredb.hints.link import RedisConfig, RedisLink
from ochredb.hints.redis import RedisHints
from ochredb.testing.server_process import free_port
from ochredb_log.config import LogConfig
from ochredb_node.config import NodeConfig
from ochredb_node.node import Node
from tests.components.redis import RedisServer
from tests.unit.kernel import add_rows, ids_of, make_collection

CLOCK = SystemClock()
STORE = "0190-store"


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer.start(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """Running, and empty."""
    if shared_server.process is None:
        shared_server.restart()
    shared_server.flush()
    return shared_server


@contextlib.contextmanager
def _link(url: str, *, timeout_s: float = 0.2, **more: Any) -> Iterator[RedisLink]:
    """timeout_s: generous, because the machine may be busy."""
    config = RedisConfig(url=url, timeout_s=timeout_s, left_alone_s=0.2, **more)
    link = RedisLink(config, STORE, CLOCK, random.Random(5))
    link.start()
    try:
        yield link
    finally:
        link.close()


@contextlib.contextmanager
def _hints(link: RedisLink, name: str) -> Iterator[tuple[RedisHints, list[Hint]]]:
    """And what its listeners have heard."""
    hints, heard = RedisHints(link, name), list[Hint]()

    def listener(kind: HintKind) -> Listener:
        return lambda collection, number: heard.append(Hint(kind, collection, number))

    for kind in HintKind:
        hints.subscribe(kind, listener(kind))
    hints.start()
    try:
        yield hints, heard
    finally:
        hints.close()


def _until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.01)


def _told(publisher: RedisHints, heard: list[Hint], number: int) -> None:
    """Hints may be lost; what is published again and again arrives once both ends are there."""
    hint = Hint(HintKind.APPENDED, "c", number)

    def arrived() -> bool:
        publisher.publish(hint)
        return hint in heard

    _until(arrived)


class TestHints:
    def test_reach_other_processes_once_and_their_own_without_redis(
        self, server: RedisServer
    ) -> None:
        with (
            _link(server.url) as one, _link(server.url) as two,
            _hints(one, "one") as (first, at_first), _hints(two, "two") as (second, at_second),
        ):  # fmt: skip
            _told(first, at_second, 1)
            _told(second, at_first, 2)
            expected = [Hint(kind, "d", 5) for kind in HintKind]
            for hint in expected:
                first.publish(hint)
            assert [hint for hint in at_first if hint.collection_id == "d"] == expected, "at once"
            _told(second, at_first, 3)  # By now the others have arrived.
            _told(first, at_second, 4)
            for heard in (at_first, at_second):
                assert [hint for hint in heard if hint.collection_id == "d"] == expected

    def test_of_other_stores_are_not_heard(self, server: RedisServer) -> None:
        config = RedisConfig(url=server.url, left_alone_s=0.2)
        other = RedisLink(config, "another", CLOCK, random.Random(6))
        other.start()
        try:
            with (
                _link(server.url) as mine, _hints(mine, "a") as (_, heard),
                _hints(other, "b") as (stranger, at_stranger), _link(server.url) as third,
                _hints(third, "c") as (friend, _),
            ):  # fmt: skip
                stranger.publish(Hint(HintKind.DROPPED, "theirs"))
                _told(friend, heard, 1)
                assert Hint(HintKind.DROPPED, "theirs") in at_stranger
                assert Hint(HintKind.DROPPED, "theirs") not in heard
        finally:
            other.close()

    def test_nonsense_on_the_channel_is_passed_over(self, server: RedisServer) -> None:
        with (
            _link(server.url) as one, _link(server.url) as two,
            _hints(one, "one") as (first, _), _hints(two, "two") as (second, heard),
            server.client() as client,
        ):  # fmt: skip
            _told(first, heard, 1)
            before = len(heard)
            for data in (b"\xff", b"[]", b'["x","appended","c",-1]', b"x" * 1_000_000):
                assert client.publish(f"ochredb:{STORE}:hints", data) == 2
            _told(first, heard, 2)
            assert {hint.number for hint in heard[before:]} <= {1, 2}
            assert second.received == len(heard)

    def test_come_again_after_a_stop_a_restart_and_a_flush(self, server: RedisServer) -> None:
        with (
            _link(server.url) as one, _link(server.url) as two,
            _hints(one, "one") as (first, at_first), _hints(two, "two") as (_, at_second),
        ):  # fmt: skip
            _told(first, at_second, 1)
            server.kill()
            begun = time.monotonic()
            for number in range(1_000):
                first.publish(Hint(HintKind.APPENDED, f"c{number}", 1))
            assert time.monotonic() - begun < 2.0, "publishing waits for nothing"
            assert len([hint for hint in at_first if hint.collection_id != "c"]) == 1_000
            server.restart()
            _told(first, at_second, 2)
            server.flush()
            _told(first, at_second, 3)

    def test_a_server_that_is_down_at_the_start_is_found_later(self, server: RedisServer) -> None:
        server.stop()
        with (
            _link(server.url) as one, _link(server.url) as two,
            _hints(one, "one") as (first, at_first), _hints(two, "two") as (_, at_second),
        ):  # fmt: skip
            first.publish(Hint(HintKind.VERSION, "c", 4))
            assert at_first == [Hint(HintKind.VERSION, "c", 4)]
            _until(lambda: one.failures > 0 or not at_second)
            server.restart()
            _told(first, at_second, 1)


class TestHotFragments:
    def test_are_read_by_others_and_go_with_time(self, server: RedisServer) -> None:
        with _link(server.url) as one, _link(server.url) as two:
            writer, reader = RedisHotFragments(one, ttl_s=1.0), RedisHotFragments(two)
            writer.put("fragments/x", 8, memoryview(b"\x00bytes"))
            _until(lambda: reader.get("fragments/x", 8, 6) == b"\x00bytes")
            assert reader.get("fragments/x", 0, 6) is None
            assert reader.get("fragments/x", 8, 5) is None, "not so many"
            _until(lambda: reader.get("fragments/x", 8, 6) is None)

    def test_large_ones_are_left_to_the_store(self, server: RedisServer) -> None:
        with _link(server.url) as link, server.client() as client:
            hot = RedisHotFragments(link)
            hot.put("large", 0, b"x" * 2_000_000)
            hot.put("small", 0, b"x")
            _until(lambda: hot.get("small", 0, 1) == b"x")
            assert client.keys() == [f"ochredb:{STORE}:fragment:small:0".encode()]
            assert hot.get("large", 0, 2_000_000) is None

    def test_what_is_queued_is_bounded_and_the_rest_dropped(self, server: RedisServer) -> None:
        server.pause()
        try:
            with _link(server.url, queue_bytes_max=1_000, patience_s=0.5) as link:
                hot = RedisHotFragments(link)
                begun = time.monotonic()
                for number in range(100):
                    hot.put(f"f{number}", 0, b"x" * 100)
                assert time.monotonic() - begun < 0.3, "nobody waits"
                assert link.dropped >= 80
                assert hot.get("f0", 0, 100) is None
        finally:
            server.resume()

    def test_a_full_redis_is_done_without(self, server: RedisServer) -> None:
        with server.client() as client, _link(server.url) as link:
            hot = RedisHotFragments(link)

            def arrives() -> bool:
                hot.put("f", 0, b"data")
                return hot.get("f", 0, 4) == b"data"

            client.config_set("maxmemory", "1")
            try:
                _until(lambda: not arrives() and link.failures > 0)
            finally:
                client.config_set("maxmemory", "0")
            _until(arrives)


class _Liar:
    """A server that answers everything with the same bytes, or with nothing at all."""

    def __init__(self, answer: bytes, *, pause_s: float = 0.0) -> None:
        self._answer, self._pause_s = answer, pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.asked = 0
        self._taken: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = self._listener.accept()
                self._taken.append(taken)
                threading.Thread(target=self._lie, args=(taken,), daemon=True).start()

    def _lie(self, taken: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while taken.recv(1 << 16):
                self.asked += 1
                for at in range(0, len(self._answer), max(1, len(self._answer) // 4)):
                    time.sleep(self._pause_s)
                    taken.sendall(self._answer[at : at + max(1, len(self._answer) // 4)])

    def close(self) -> None:
        for each in (self._listener, *self._taken):
            each.close()


LIES = {
    "nothing": b"",
    "garbage": b"\x00\xff garbage \r\n",
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "another type": b":17\r\n",
    "a list": b"*2\r\n$3\r\nabc\r\n:1\r\n",
    "endless": b"$4000000000\r\nx",
    "deep": b"*1\r\n" * 50_000,
    "no number": b"$abc\r\n",
    "error": b"-ERR no\r\n",
    "ok": b"+OK\r\n",
    "other bytes": b"$4\r\nevil\r\n",
    # To a frontend: this tenant owes all that it can, and a million of its requests run elsewhere.
    "limits": b"*2\r\n$4\r\n-1e9\r\n:1000000\r\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_costs_little_and_changes_nothing(lie: str) -> None:
    liar = _Liar(LIES[lie])
    try:
        with _link(liar.url, timeout_s=0.02) as link, _hints(link, "me") as (hints, heard):
            hot = RedisHotFragments(link)
            config = LimitsConfig(requests_per_second=1e6, concurrent_requests=4)
            limits = SharedLimits(link, config, CLOCK, "me")
            limits.start()
            deadline = time.monotonic() + 1.5
            slowest_s, rounds = 0.0, 0
            while time.monotonic() < deadline:
                begun = time.monotonic()
                hints.publish(Hint(HintKind.APPENDED, "c", rounds))
                hot.put("f", 0, b"true")
                limits.enter("tenant")
                got = hot.get("f", 0, 4)
                limits.leave("tenant")
                slowest_s = max(slowest_s, time.monotonic() - begun)
                rounds += 1
                assert got in (None, b"evil"), "which the catalog's checksum refuses"
                time.sleep(0.005)
            assert len(heard) == rounds, "told here, and by nobody else"
            # Twenty milliseconds, and what a busy machine adds.
            assert slowest_s < 0.6
            limits.close()
    finally:
        liar.close()


def test_a_slow_server_is_asked_once_and_then_left_alone() -> None:
    liar = _Liar(b"+OK\r\n", pause_s=0.3)
    try:
        with _link(liar.url, timeout_s=0.02, patience_s=30.0) as link:
            hot = RedisHotFragments(link)
            assert hot.get("f", 0, 4) is None
            begun = time.monotonic()
            for _ in range(200):
                assert hot.get("f", 0, 4) is None
            assert time.monotonic() - begun < 0.5
    finally:
        liar.close()


def test_nobody_listening_costs_a_caller_nothing() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    with _link(url, timeout_s=0.02) as link:
        hot = RedisHotFragments(link)
        _until(lambda: link.failures > 0)
        begun = time.monotonic()
        for _ in range(1_000):
            assert hot.get("f", 0, 4) is None
            hot.put("f", 0, b"data")
        assert time.monotonic() - begun < 1.0
        assert link.is_left_alone


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="redis_url"):
        RedisLink(RedisConfig(url="redis://localhost:abc"), STORE, CLOCK, random.Random(1))


class TestLimits:
    def test_frontends_share_a_rate(self, server: RedisServer) -> None:
        config = LimitsConfig(requests_per_second=100.0, requests_burst=20.0)
        with _link(server.url) as one, _link(server.url) as two:
            frontends = [
                SharedLimits(one, config, CLOCK, "1"),
                SharedLimits(two, config, CLOCK, "2"),
            ]
            for limits in frontends:
                limits.start()
            begun = time.monotonic()
            let_in = 0
            while time.monotonic() < begun + 3.0:
                for limits in frontends:
                    with contextlib.suppress(Exhausted):
                        limits.enter("a")
                        limits.leave("a")
                        let_in += 1
                time.sleep(0.001)
            taken_s = time.monotonic() - begun
            agreed = 20 + 100 * taken_s
            # Apart each would have let the whole of it in.
            assert 0.6 * agreed < let_in < 1.25 * agreed + 20, (let_in, agreed)
            for limits in frontends:
                limits.close()

    def test_frontends_share_what_runs_and_forget_one_that_ended(self, server: RedisServer) -> None:
        config = LimitsConfig(concurrent_requests=3)
        with _link(server.url) as one, _link(server.url) as two:
            first = SharedLimits(one, config, CLOCK, "1")
            second = SharedLimits(two, config, CLOCK, "2")
            first.start()
            second.start()
            for _ in range(3):
                first.enter("a")

            second.enter("a")  # Its own share; no more of them while it knows of the others.

            def refused() -> bool:
                try:
                    second.enter("a")
                except Exhausted:
                    return True
                second.leave("a")
                return False

            _until(refused)
            first.close()  # Without a word, as a killed one.
            _until(lambda: not refused())
            second.close()

    def test_who_writes_to_redis_cannot_shut_a_tenant_out(self, server: RedisServer) -> None:
        """Again and again it is told that all is used up, and believes it."""
        config = LimitsConfig(requests_per_second=1_600.0, concurrent_requests=4)
        with _link(server.url) as link, server.client() as client:
            limits = SharedLimits(link, config, CLOCK, "1")
            limits.start()
            let_in = refused = 0

            def others_refused() -> int:
                """How many of four at once are not let in."""
                running = 0
                with contextlib.suppress(Exhausted):
                    for _ in range(4):
                        limits.enter("a")
                        running += 1
                for _ in range(running):
                    limits.leave("a")
                return 4 - running

            def lie_and_ask() -> bool:
                nonlocal let_in, refused
                now_ms = int(time.time() * 1_000)
                lie = {"tokens": "-1e9", "at": now_ms, "r:2": f"1000000:{now_ms}"}
                client.hset(f"ochredb:{STORE}:limit:a", mapping=lie)
                not_let_in = others_refused()
                refused += not_let_in >= 3
                let_in += 4 - not_let_in
                return refused >= 50 and let_in >= 400

            _until(lie_and_ask)
            limits.close()

    def test_without_redis_each_applies_them_alone(self, server: RedisServer) -> None:
        config = LimitsConfig(requests_per_second=1.0, requests_burst=2.0)
        with _link(server.url) as link:
            limits = SharedLimits(link, config, CLOCK, "1")
            limits.start()
            limits.enter("a")
            server.kill()
            limits.enter("a")
            with pytest.raises(Exhausted):
                limits.enter("a")
            limits.enter("b")
            limits.enter("b")
            with pytest.raises(Exhausted):
                limits.enter("b")
            limits.close()

    def test_scripts_that_were_flushed_are_given_again(self, server: RedisServer) -> None:
        config = LimitsConfig(requests_per_second=10.0)
        with _link(server.url) as link, server.client() as client:
            limits = SharedLimits(link, config, CLOCK, "1")
            limits.start()
            key = f"ochredb:{STORE}:limit:a"
            for _ in range(2):
                limits.enter("a")
                limits.leave("a")
                _until(lambda: client.exists(key) == 1)
                assert 0 < client.pttl(key) <= 10_000
                server.flush()
            limits.close()


class TestHotFragmentsInTheLog:
    """What a log node wrote, read by another process from Redis; and when Redis lies about it."""

    @pytest.mark.parametrize("redis", ["true", "lying", "flushed", "down"])
    def test_a_reader_gets_the_bytes_that_were_written(
        self, server: RedisServer, tmp_path: Path, redis: str
    ) -> None:
        with _link(server.url) as written, _link(server.url) as read, server.client() as client:
            config = NodeConfig(path=str(tmp_path / "s"), log=LogConfig(inline_bytes_max=0))
            with _node(config, written) as writer, _node(config, read) as reader:
                collection = make_collection(writer)
                add_rows(writer, collection, 0, 100)
                (item,) = writer.store.list("fragments/")
                pattern = f"ochredb:{STORE}:fragment:{item.key}:*"
                _until(lambda: len(client.keys(pattern)) == 1)
                _until(lambda: reader.logs.hot.get(item.key, 0, item.size) is not None)
                if redis == "lying":
                    client.set(client.keys(pattern)[0], b"\0" * item.size)
                elif redis == "flushed":
                    server.flush()
                elif redis == "down":
                    server.kill()
                fetched: list[str] = []
                get_range = reader.store.get_range

                def counted(key: str, start: int, stop: int) -> bytes:
                    fetched.append(key)
                    return get_range(key, start, stop)

                reader.store.get_range = counted  # type: ignore[method-assign]
                assert len(ids_of(reader, collection)) == 100
                assert fetched == ([] if redis == "true" else [item.key])


@contextlib.contextmanager
def _node(config: NodeConfig, link: RedisLink) -> Iterator[Node]:
    """A node without background work that finds hot bytes through this link."""
    node = Node(config)
    node.start(background=False)
    node.logs.hot = RedisHotFragments(link)
    try:
        yield node
    finally:
        node.close()
