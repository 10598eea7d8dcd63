"""The benchmark's own arithmetic: a wrong ratio or a wrong ground truth would flatter us."""

from __future__ import annotations

import socket
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import orjson
import picture
import pytest
from peer_bench.bench import recall
from peer_bench.data import BATCH, NEAREST, Data, exact
from peer_bench.http_client import Connection
from peer_bench.report import Row, metrics, shown, table
from peer_bench.servers import merge


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


def test_the_picture_has_a_bar_per_operation() -> None:
    keys = list(picture.BARS)[:4]
    ratios = (0.2, 1.0, 12.5, None)
    measured = [
        {"dim": 128, "group": group, "metric": metric, "ratio": ratio}
        for (group, metric), ratio in zip(keys, ratios, strict=True)
    ]
    root = ElementTree.fromstring(picture.draw(measured, "a & b", ["ours", "theirs"]))
    bars = [node for node in root.iter() if node.get("height") == str(picture.BAR)]
    assert [bar.get("fill") for bar in bars] == [picture.WORSE, picture.BETTER, picture.BETTER]
    words = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert {"a & b", "0.2x", "1x", "12.5x"} <= set(words)
