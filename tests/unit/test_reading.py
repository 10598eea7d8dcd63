"""Connections that go on in another process, and come back, lose nothing and answer in order."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import httpx
import pytest

from ochredb.clock import SystemClock
from ochredb.metrics import Metrics
from ochredb_frontend import channel, reading
from ochredb_frontend.app import App
from ochredb_frontend.channel import Channel
from ochredb_frontend.reading import ReaderProtocol, Reading, read_bytes
from ochredb_frontend.server import Connections, Server
from ochredb_frontend.sharing import TURN_S
from ochredb_node.node import Node, NodeConfig

from .live_server import DATABASE, Live

COLLECTION = "/api/v2/tenants/t/databases/d/collections/c"
_JSON = "content-type: application/json"


def post(path: str, value: object) -> bytes:
    body = json.dumps(value).encode()
    head = [f"POST {path} HTTP/1.1", "host: x", _JSON, f"content-length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def chunked(path: str, value: object) -> bytes:
    body = json.dumps(value).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\n{_JSON}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    )
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def count(path: str) -> bytes:
    return f"GET {path}/count HTTP/1.1\r\nhost: x\r\n\r\n".encode()


def test_only_plain_small_reads_are_a_readers() -> None:
    query = post(f"{COLLECTION}/query", {"query_embeddings": [[1]]})
    assert read_bytes(query) == len(query)
    assert read_bytes(query + count(COLLECTION)) == len(query)
    assert read_bytes(query[:-5]) == len(query), "the rest of a body is on its way"
    assert read_bytes(count(COLLECTION)) == len(count(COLLECTION))
    get = post(f"{COLLECTION}/get?limit=1&offset=2", {})
    assert read_bytes(get) == len(get)
    others = [
        post(f"{COLLECTION}/{verb}", {}) for verb in ("add", "upsert", "update", "delete", "search")
    ]
    others += [
        b"",
        query[:20],
        query.replace(b"host: x", b"Expect: 100-continue"),
        query.replace(b"host: x", b"Content-Length: 1"),
        query.replace(b"host: x", b"Upgrade: h2c"),
        query.replace(b"content-length", b"x-length"),
        query.replace(b"HTTP/1.1", b"HTTP/1.0"),
        query.replace(b"POST", b"GET"),
        count(COLLECTION).replace(b"GET", b"POST"),
        count(COLLECTION).replace(b"/collections/c", b"/collections/c/c"),
        chunked(f"{COLLECTION}/query", {}),
        b"GET /api/v2/heartbeat HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n",
    ]
    assert [read_bytes(one) for one in others] == [None] * len(others)


class Away:
    """A companion that sends every connection away whenever it is told."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self.metrics = Metrics()
        self.came_back = 0
        self.is_ready = False
        self.open = threading.Event()

    def begin(self, connections: Connections) -> None:
        self._connections, self._loop = connections, asyncio.get_running_loop()
        self._channel.attach(self._come, self._heard, lambda: None)

    def end(self) -> None:
        self._channel.close()

    def _come(self, sock: socket.socket, read: bytes) -> None:
        self.came_back += 1
        self._connections.adopt(sock, read)

    def _heard(self, kind: bytes, data: bytes) -> None:
        assert kind == channel.REPORT
        report = json.loads(data)
        self.is_ready = report["ready"]
        self.metrics.add(report["metrics"])

    def have_opened(self, collection_ids: list[str]) -> None:
        message = json.dumps(collection_ids).encode()
        self._loop.call_soon_threadsafe(self._channel.send, channel.OPEN, message)

    def send_away(self) -> None:
        self._loop.call_soon_threadsafe(self._send_away)

    def _send_away(self) -> None:
        for protocol in list(self._connections.connections):
            protocol.leave(self._channel)

    def give_back(self) -> None:
        self._loop.call_soon_threadsafe(self._channel.send, channel.GIVE_BACK)


class Two:
    """A server and its reader, in two threads of this process, on one node in memory."""

    def __init__(self) -> None:
        ours, theirs = channel.pair()
        self.away = Away(ours)
        self.node = Node(NodeConfig())
        self.node.start()
        self.live = Live(self.node.frontend, companion=self.away)
        end, app = Channel(theirs), App(self.live.app.frontend)
        self.told: list[tuple[str, int]] = []
        self.opened: list[str] = []
        self.may_open = threading.Event()
        companion = Reading(
            end,
            app.metrics,
            SystemClock(),
            on_append=lambda *told: self.told.append(told),
            open_collection=self._open,
        )
        self.reader = Server(
            app,
            None,
            on_ready=lambda _: None,
            companion=companion,
            protocol=partial(ReaderProtocol, end),
            drain_timeout_s=5,
        )
        self.thread = threading.Thread(target=self.reader.run)
        self.thread.start()
        self.path = self.live.collection()

    def _open(self, collection_id: str) -> None:
        assert self.may_open.wait(10)
        self.opened.append(collection_id)
        assert collection_id != "broken"

    def wait_until_ready(self) -> None:
        end_s = time.monotonic() + 10
        while not self.away.is_ready and time.monotonic() < end_s:
            time.sleep(0.01)
        assert self.away.is_ready

    def close(self) -> None:
        self.may_open.set()
        self.live.close()
        self.thread.join(10)
        assert not self.thread.is_alive(), "a reader ends when its server does"
        self.node.close()

    def connect(self) -> socket.socket:
        sock = socket.create_connection(self.live.address)
        sock.settimeout(10.0)
        return sock

    def reads_elsewhere(self) -> int:
        operations = ("collection_query", "collection_get", "collection_count")
        return sum(self.away.metrics.requests(name, 200) for name in operations)


@pytest.fixture
def two() -> Iterator[Two]:
    both = Two()
    yield both
    both.close()


def answers(sock: socket.socket, wanted: int) -> list[tuple[int, bytes]]:
    """The next answers: status and body."""
    found: list[tuple[int, bytes]] = []
    data = b""
    while len(found) < wanted:
        head, end, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length and len(rest) >= int(length[1]):
            found.append((int(head[9:12]), rest[: int(length[1])]))
            data = rest[int(length[1]) :]
            continue
        more = sock.recv(1 << 16)
        assert more, f"closed after {len(found)} of {wanted} answers"
        data += more
    assert data == b""
    return found


def test_a_connection_goes_on_elsewhere_and_comes_back(two: Two) -> None:
    query = post(f"{two.path}/query", {"query_embeddings": [[1, 2]], "n_results": 1})
    with two.connect() as sock:
        sock.sendall(query)
        (first,) = answers(sock, 1)
        two.away.send_away()
        time.sleep(0.1)
        for _ in range(20):
            sock.sendall(query)
            assert answers(sock, 1) == [first]
        assert two.away.came_back == 0
        sock.sendall(post(f"{two.path}/upsert", {"ids": ["b"], "embeddings": [[3, 4]]}))
        assert answers(sock, 1)[0][0] == 200
        assert two.away.came_back == 1
        sock.sendall(count(two.path))
        assert answers(sock, 1) == [(200, b"2")]
        two.away.send_away()
        time.sleep(0.1)
        sock.sendall(count(two.path))
        assert answers(sock, 1) == [(200, b"2")]
        two.away.give_back()
        deadline_s = time.monotonic() + 10
        while two.away.came_back < 3 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert two.away.came_back == 3, "with that of the client that made the collection"
        sock.sendall(query)
        assert answers(sock, 1) == [first]
    while two.reads_elsewhere() < 21:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert two.reads_elsewhere() == 21, "what a reader answers counts as its server's"


def test_requests_in_pieces_and_in_a_row_are_answered_in_order(two: Two) -> None:
    """Wherever the connection is, however its bytes come."""
    rng = random.Random(5)
    query = post(f"{two.path}/query", {"query_embeddings": [[1, 2]]})
    large = post(f"{two.path}/get", {"ids": ["a"] * 30_000})
    some = [
        (query, 200),
        (count(two.path), 200),
        (post(f"{two.path}/get", {}), 200),
        (large, 200),
        (post(f"{two.path}/query", {"query_embeddings": 1}), 422),
        (chunked(f"{two.path}/get", {}), 200),
        (b"GET /api/v2/heartbeat HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (post(f"{two.path}/upsert", {"ids": ["a"], "embeddings": [[1, 2]]}), 200),
        (b"GET /api/v2/nothing HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (post(f"{two.path}/update", {"ids": ["a"], "documents": ["x" * 200_000]}), 200),
    ]
    for _ in range(60):
        chosen = [rng.choice(some) for _ in range(rng.randint(1, 6))]
        data = b"".join(request for request, _ in chosen)
        pieces = rng.choice([1, 1, 2, 4, 7])
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(pieces - 1))
        with two.connect() as sock:
            sock.sendall(query)
            answers(sock, 1)
            two.away.send_away()
            if rng.random() < 0.7:
                time.sleep(0.01)
            for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
                sock.sendall(data[start:stop])
                if pieces > 1:
                    time.sleep(0.002)
            found = answers(sock, len(chosen))
        assert [status for status, _ in found] == [status for _, status in chosen]
    assert two.away.came_back > 10


def test_a_reader_is_ready_when_what_it_was_told_to_open_is_open(two: Two) -> None:
    two.away.have_opened(["own", "broken"])
    time.sleep(2.5 * TURN_S)
    assert not two.away.is_ready
    two.may_open.set()
    two.wait_until_ready()
    assert two.opened == ["own", "broken", "broken", "own"]


def test_a_reader_that_opens_for_too_long_is_ready_nevertheless(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_OPENING_MAX_S", 2.5 * TURN_S)
    two.away.have_opened(["c"])
    time.sleep(1.5 * TURN_S)
    assert not two.away.is_ready
    two.wait_until_ready()
    assert two.opened == []


def test_what_comes_behind_the_last_request_of_a_connection_is_not_done(two: Two) -> None:
    query = post(f"{two.path}/query", {"query_embeddings": [[1, 2]]})
    last = query.replace(b"host: x", b"host: x\r\nconnection: close")
    delete = post(f"{two.path}/delete", {"ids": ["a"]})
    for data in (last, last + delete, query + last + delete):
        with two.connect() as sock:
            sock.sendall(query)
            answers(sock, 1)
            two.away.send_away()
            time.sleep(0.1)
            sock.sendall(data)
            answer = b""
            while chunk := sock.recv(1 << 16):
                answer += chunk
            assert answer.count(b"HTTP/1.1 200") == data.count(b"/query")
            assert answer.count(b"connection: close") == 1
    assert two.live.http.get(f"{two.path}/count").json() == 1


def test_clients_read_their_writes_while_their_connections_move(two: Two) -> None:
    done = threading.Event()
    problems: list[object] = []

    def work(number: int) -> None:
        rng, mine = random.Random(number), 0
        try:
            with two.connect() as sock:
                for _ in range(150):
                    if rng.random() < 0.3:
                        mine += 1
                        row = {"ids": [f"{number}-{mine}"], "embeddings": [[1, 2]]}
                        sock.sendall(post(f"{two.path}/add", row))
                        assert answers(sock, 1)[0][0] == 201
                    ids = [f"{number}-{i}" for i in range(1, mine + 1)]
                    sock.sendall(post(f"{two.path}/get", {"ids": ids, "include": []}))
                    status, body = answers(sock, 1)[0]
                    assert (status, sorted(json.loads(body)["ids"])) == (200, sorted(ids))
        except Exception as error:
            problems.append(error)

    def move() -> None:
        while not done.wait(0.003):
            two.away.send_away()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    mover = threading.Thread(target=move)
    for thread in [*threads, mover]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    mover.join()
    assert problems == []
    assert two.away.came_back > 20


def test_descriptors_are_not_lost(two: Two) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    query = post(f"{two.path}/query", {"query_embeddings": [[1, 2]]})
    write = post(f"{two.path}/upsert", {"ids": ["a"], "embeddings": [[1, 2]]})

    def go_there_and_back() -> None:
        with two.connect() as sock:
            for request in (query, write):
                sock.sendall(request)
                answers(sock, 1)
                two.away.send_away()
                time.sleep(0.01)

    go_there_and_back()
    before = descriptors()
    for _ in range(20):
        go_there_and_back()
    deadline_s = time.monotonic() + 5
    while descriptors() > before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert descriptors() <= before


def test_a_large_message_and_a_full_channel() -> None:
    """What does not fit waits, and comes in order."""

    async def play() -> list[tuple[bytes, bytes]]:
        ours, theirs = channel.pair()
        left, right = Channel(ours), Channel(theirs)
        heard: list[tuple[bytes, bytes]] = []
        ended = asyncio.Event()

        def come(sock: socket.socket, read: bytes) -> None:
            with sock:
                heard.append((channel.CONNECTION, read))

        def hear(kind: bytes, data: bytes) -> None:
            heard.append((kind, data))
            if data == b"last":
                left.close()

        left.attach(come, hear, lambda: None)
        with socket.socket() as one:
            for number in range(200):
                left.send_connection(one.fileno(), b"%d" % number * 100_000)
            left.send(channel.REPORT, b"last")
        right.attach(come, hear, ended.set)
        await asyncio.wait_for(ended.wait(), 20)
        assert left.is_closed and right.is_closed
        assert not right.tell(channel.REPORT)
        return heard

    heard = asyncio.run(play())
    assert heard == [
        *((channel.CONNECTION, b"%d" % number * 100_000) for number in range(200)),
        (channel.REPORT, b"last"),
    ]


def test_connections_that_were_sent_before_an_end_arrive() -> None:
    """The system tells of unread data at the other end before it tells what that had sent."""

    async def play() -> list[bytes]:
        ours, theirs = channel.pair()
        left, right = Channel(ours), Channel(theirs)
        came: list[bytes] = []
        ended = asyncio.Event()

        def come(sock: socket.socket, read: bytes) -> None:
            with sock:
                came.append(read)

        left.attach(come, lambda _kind, _data: None, ended.set)
        right.attach(come, lambda _kind, _data: None, lambda: None)
        with socket.socket() as one:
            assert left.tell(channel.APPENDED, b"c 1")
            right.send_connection(one.fileno(), b"given back")
        right.close()
        await asyncio.wait_for(ended.wait(), 10)
        return came

    assert asyncio.run(play()) == [b"given back"]


def test_a_channel_that_fails_ends_instead_of_going_on_with_half_a_message() -> None:
    class Failing:
        """A socket that has no memory for the second message."""

        def __init__(self, sock: socket.socket) -> None:
            self._sock, self.sent = sock, 0

        def sendmsg(self, *arguments: Any) -> int:
            self.sent += 1
            if self.sent == 2:
                raise OSError(errno.ENOMEM, "no memory")
            return self._sock.sendmsg(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

    async def play() -> list[bytes]:
        ours, theirs = channel.pair()
        left, right = Channel(cast(socket.socket, Failing(ours))), Channel(theirs)
        came: list[bytes] = []
        ended = asyncio.Event()

        def come(sock: socket.socket, read: bytes) -> None:
            with sock:
                came.append(read)

        left.attach(come, lambda _kind, _data: None, lambda: None)
        right.attach(come, lambda _kind, _data: None, ended.set)
        with socket.socket() as one:
            left.send_connection(one.fileno(), b"x" * 100_000)
            left.send_connection(one.fileno(), b"another's")
        await asyncio.wait_for(ended.wait(), 10)
        assert left.is_closed and not left.takes
        return came

    assert asyncio.run(play()) == []


def test_a_signal_and_the_end_of_the_channel_are_one_stop(two: Two) -> None:
    """A process manager signals a server and its readers alike."""
    two.reader.stop()
    two.live.server.stop()
    two.thread.join(10)
    assert not two.thread.is_alive() and not two.reader.is_cut_off


def test_a_server_whose_reader_is_gone_keeps_its_connections(two: Two) -> None:
    two.reader.stop()
    two.thread.join(10)
    query = post(f"{two.path}/query", {"query_embeddings": [[1, 2]]})
    with two.connect() as sock:
        for _ in range(5):
            sock.sendall(query)
            assert answers(sock, 1)[0][0] == 200
            two.away.send_away()
            time.sleep(0.01)
    assert httpx.get(f"{two.live.http.base_url}{DATABASE}").status_code == 200
