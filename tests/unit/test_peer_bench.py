"""The benchmark's own arithmetic: a wrong ratio or a wrong ground truth would flatter us."""

from __future__ import annotations

import argparse
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import orjson
import pytest
from peer_bench.bench import Bench, in_common, recall
from peer_bench.data import BATCH, NEAREST, Data, exact
from peer_bench.http_client import Connection
from peer_bench.phases_many import turns
from peer_bench.report import Row, metrics, shown, table
from peer_bench.servers import Server, merge
from peer_bench.slices import Slice, send_all


def test_a_ratio_above_one_always_means_that_a_is_better() -> None:
    rows = [
        Row("query", "QPS", "/s", "high", {"ours": 30.0, "theirs": 10.0}),
        Row("query", "p50", "ms", "low", {"ours": 2.0, "theirs": 8.0}),
        Row("query", "p99", "ms", "low", {"ours": 8.0, "theirs": 2.0}),
        Row("query", "unknown", "ms", "low", {"ours": float("nan"), "theirs": 2.0}),
        Row("query", "one server", "ms", "low", {"ours": 1.0}),
    ]
    measured = metrics(rows, ["ours", "theirs"], 128)
    assert [one["ratio"] for one in measured] == [3.0, 4.0, 0.25, None, None]
    assert measured[3]["A"] is None
    text = table(measured, ["ours", "theirs"])
    assert "| query | p50 | ms | 2.000 | 8.000 | 4.00x |" in text
    assert all(len(line.split("|")) == 8 for line in text.splitlines())


def test_numbers_are_shown_with_about_four_digits() -> None:
    assert [shown(v) for v in (1234.4, 123.44, 12.344, 1.2344, float("nan"), None)] == [
        *("1234", "123.4", "12.34", "1.234", "-", "-")
    ]


def test_ground_truth_is_the_nearest_of_the_rows_that_match() -> None:
    data = Data(n=500, dim=16, queries=70, seed=1)
    mask = data.num < 300
    wanted = exact(data.x, data.q, mask)
    assert len(wanted) == 70
    for query, rows in zip(data.q, wanted, strict=True):
        distance = ((data.x.astype(float) - query) ** 2).sum(axis=1)
        distance[~mask] = np.inf
        assert rows == set(np.argsort(distance)[:NEAREST].tolist())
    nothing = exact(data.x, data.q, np.zeros(500, bool))
    assert nothing == [set()] * 70


def test_recall_counts_the_rows_that_were_found() -> None:
    def answer(*rows: int) -> bytes:
        return orjson.dumps({"ids": [[f"id-{row:08d}" for row in rows]]})

    wanted = {0: {1, 2}, 1: {3, 4}}
    assert recall({0: answer(1, 2), 1: answer(3, 9)}, wanted.__getitem__) == 0.75


def test_recalls_are_compared_over_the_queries_that_both_answered() -> None:
    answers = {"ours": {0: b"a", 1: b"b", 2: b"c"}, "theirs": {1: b"d", 5: b"e"}}
    assert in_common(answers) == {"ours": {1: b"b"}, "theirs": {1: b"d"}}


def test_servers_take_turns_and_neither_is_always_second() -> None:
    servers = [Server(label, "http://127.0.0.1:1") for label in ("ours", "theirs")]
    bench = Bench(argparse.Namespace(), servers)
    orders = [[server.label for server in bench.order(number)] for number in range(4)]
    assert orders == [["ours", "theirs"], ["theirs", "ours"]] * 2


def test_turns_cover_everything_once_whatever_the_count() -> None:
    for count in (3, 20, 47):
        pieces = turns(range(count), 20)
        assert len(pieces) == 20
        assert [one for piece in pieces for one in piece] == list(range(count))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_percentiles_and_rates_of_slices() -> None:
    part = Slice()
    assert math.isnan(part.percentile_ms(50))
    part.add([0.001, 0.002], 0.5, 0.1, 0.0)
    part.add([0.003, 0.004, 0.005], 0.5, 0.1, 0.0, count=100)
    assert part.percentile_ms(50) == pytest.approx(3.0)
    assert part.percentile_ms(99) == pytest.approx(4.96)
    assert part.rates == [4.0, 200.0]
    assert (part.count, part.wall_s) == (102, 1.0)


def test_only_the_one_server_gets_the_further_fields() -> None:
    servers = [
        Server("ours", "http://127.0.0.1:1", query_extra={"target_recall": 0}),
        Server("theirs", "http://127.0.0.1:2"),
    ]
    bench = Bench(argparse.Namespace(), servers)
    data, ids = Data(n=250, dim=4, queries=2, seed=2), {"ours": "a", "theirs": "b"}
    requests = bench.query_requests(data, ids, range(2), with_extra=True)
    told = {
        label: orjson.loads(some[0].partition(b"\r\n\r\n")[2]) for label, some in requests.items()
    }
    assert told["ours"].pop("target_recall") == 0
    assert told["ours"] == told["theirs"]
    plain = bench.query_requests(data, ids, range(2))
    assert all(b"target_recall" not in one for some in plain.values() for one in some)


def test_bodies_say_the_same_in_both_encodings() -> None:
    data = Data(n=BATCH + 10, dim=4, queries=1, seed=2)
    assert len(data.batches(data.n, True)) == 2
    plain, packed = (orjson.loads(data.batch(0, 3, encoded)) for encoded in (False, True))
    assert plain["ids"] == packed["ids"] == data.ids[:3]
    assert plain["metadatas"] == packed["metadatas"]
    np.testing.assert_array_equal(np.array(plain["embeddings"], np.float32), data.x[:3])
    again = orjson.loads(data.batch(data.n - 1, data.n, True, prefix="new-"))
    assert again["ids"] == [f"new-{data.n - 1:08d}"]


def test_configurations_merge_deeply() -> None:
    merged = merge({"hnsw": {"space": "l2", "ef": 1}}, {"hnsw": {"ef": 2}, "x": 3})
    assert merged == {"hnsw": {"space": "l2", "ef": 2}, "x": 3}


@contextmanager
def canned_server(*pieces: bytes) -> Iterator[str]:
    """A server that sends these pieces to the first request, whatever it is, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(65536)
                for piece in pieces:
                    accepted.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@contextmanager
def canned_answers(*answers: bytes) -> Iterator[str]:
    """A server that gives these answers, one per request, on one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                for answer in answers:
                    accepted.recv(65536)
                    accepted.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 5\r\n\r\n[1", b",2]"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[1\r\n",
            b"3;x\r\n,2]\r",
            b"\n0\r\n\r\n",
        ),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n[1", b",2]"),
    ],
    ids=["length", "chunked", "close"],
)
def test_the_client_reads_every_framing(pieces: tuple[bytes, ...]) -> None:
    with canned_server(*pieces) as url:
        connection = Connection(url)
        assert connection.call("GET", "/") == [1, 2]
        connection.close()


def test_an_answer_cut_short_is_an_error() -> None:
    with canned_server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort") as url:
        connection = Connection(url)
        with pytest.raises(ConnectionError):
            connection.send(connection.build("GET", "/"))
        connection.close()


def test_every_429_is_counted_and_repeated() -> None:
    refusal = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"
    with canned_answers(
        refusal, refusal, b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
    ) as url:
        connection, latencies_s, refused_s = Connection(url), list[float](), list[float]()
        send_all([connection.build("POST", "/add", b"{}")], refused_s)(connection, 0, latencies_s)
        connection.close()
    assert (len(refused_s), len(latencies_s)) == (2, 1)


def test_a_counter_is_summed_over_its_labels() -> None:
    text = b'# TYPE x_total counter\nx_total{a="1"} 2\nx_total{a="2"} 3.5\nx_total_more 9\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: " + str(len(text)).encode() + b"\r\n\r\n"
    with canned_answers(head + text, head + text) as url:
        server = Server("ours", url)
        assert server.counter("x_total") == 5.5
        assert server.counter("y_total") is None
        server.connection.close()
