"""The application behind a real socket: what middleware would do, and both ways to the handlers."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import DeadlineExceeded
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.server import listen

from .fake_roles import FakeLog
from .live_server import DATABASE, ONE, Live, Starter

JSON = {"content-type": "application/json"}
LARGE = {**ONE, "documents": ["x" * 40_000]}  # Too large to be parsed on the loop.


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    for live in starter.started:
        live.close()


def raw(live: Live, data: bytes) -> bytes:
    """What the server sends back on a new connection, until it is silent for a moment."""
    with socket.create_connection(live.address) as sock:
        sock.sendall(data)
        sock.settimeout(1.0)
        answer = b""
        try:
            while chunk := sock.recv(65536):
                answer += chunk
                head, _, body = answer.partition(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                if length and len(body) >= int(length):
                    break
        except TimeoutError:
            pass
        return answer


def wait_until(check: Any, timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# -- both ways to the handlers


def test_hot_and_other_routes_answer(start: Starter) -> None:
    live = start()
    path = live.collection()
    assert live.http.get(f"{path}/count").json() == 1
    assert live.http.head(f"{path}/count").status_code == 200
    assert live.http.head("/api/v2/version").content == b""
    assert live.http.get("/api/v2/version").json() == "1.0.0"
    answer = live.http.post(f"{path}/query", json={"query_embeddings": [[1, 2]]})
    assert answer.json()["distances"] == [[0.0]]
    assert answer.headers["content-type"] == "application/json"
    assert live.http.post(f"{path}/delete", json={"ids": ["a"]}).json() == {"deleted": 1}


def test_quick_reads_run_on_the_event_loop(start: Starter) -> None:
    live = start()
    path = live.collection()
    threads: list[str] = []

    def note(_cancel: Cancel) -> None:
        threads.append(threading.current_thread().name)

    live.world.before_answer = note
    query = {"query_embeddings": [[1, 2]]}
    slow = live.http.post(f"{path}/query", json=query)
    live.world.quick = True
    quick = live.http.post(f"{path}/query", json=query)
    assert quick.content == slow.content
    live.http.post(f"{path}/upsert", json=LARGE)
    large = {"ids": ["x" * 1_000] * 100}
    live.http.post(f"{path}/get", json=large)
    live.http.post(f"{path}/upsert", json=ONE)
    assert threads[0].startswith("ochredb-read")
    assert threads[1] == live.thread.name
    assert threads[2].startswith("ochredb-write"), "nor is it for a write"
    assert threads[3].startswith("ochredb-read"), "a large body is not parsed on the loop"
    assert threads[4] == FakeLog.THREAD, "a small write is submitted to the log"
    pattern = {"where_document": {"$regex": "a+"}}
    live.http.post(f"{path}/delete", json=pattern)
    assert threads[5].startswith("ochredb-write"), "patterns are not compiled on the loop"


def test_segments_are_percent_decoded_after_matching(start: Starter) -> None:
    live = start()
    for name, segment in (("a/b c", "a%2Fb%20c"), ("x%2Fy", "x%252Fy"), ("p+q", "p%2Bq")):
        assert live.http.post("/api/v2/tenants", json={"name": name}).status_code == 200
        assert live.http.get(f"/api/v2/tenants/{segment}").json()["name"] == name


def test_refusals_of_the_router_are_empty(start: Starter) -> None:
    live = start()
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/api/v2/heartbeat/", 404),
        ("DELETE", "/api/v2/heartbeat", 405),
        ("PUT", "/docs", 405),
        ("GET", f"{live.collection()}/add", 405),
    ):
        answer = live.http.request(method, path)
        assert (answer.status_code, answer.content) == (status, b"")
    gone = live.http.post("/api/v1/collections", content=b"x")
    assert gone.status_code == 410 and gone.json()["error"] == "Unimplemented"


# -- bodies


@pytest.mark.parametrize("content_type", [None, "text/plain"])
def test_bodies_must_be_declared_as_json(start: Starter, content_type: str | None) -> None:
    live = start()
    headers = {} if content_type is None else {"content-type": content_type}
    for path in (f"{live.collection()}/get", f"{DATABASE}/collections"):
        answer = live.http.post(path, content=b"{}", headers=headers)
        assert answer.status_code == 415
        assert answer.json() == {
            "error": "ChromaError",
            "message": "Expected request with `Content-Type: application/json`",
        }


def test_the_body_limit_holds_for_announced_and_chunked_bodies(start: Starter) -> None:
    live = start(FrontendConfig(body_bytes_max=1_000))
    paths = [f"{live.collection()}/get", f"{DATABASE}/collections"]
    for path in paths:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        announced = raw(live, f"{head}content-length: 1001\r\n\r\n".encode())
        chunk = b"200\r\n" + b" " * 512 + b"\r\n"
        chunked = raw(live, f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk * 2)
        for answer in (announced, chunked):
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"content-type: text/plain" in answer
            assert answer.endswith(b"\r\n\r\nPayload too large")
        fits = live.http.post(path, content=b"{" + b" " * 998 + b"}", headers=JSON)
        assert fits.status_code in (200, 422)


def test_a_body_of_more_than_40_mib_is_read_to_its_end_and_refused(start: Starter) -> None:
    live = start()
    path = f"{live.collection()}/get"
    answer = live.http.post(path, content=b" " * (40 * 1024 * 1024 + 1), headers=JSON)
    assert (answer.status_code, answer.text) == (413, "Payload too large")
    assert live.http.post(path, json={}).status_code == 200, "the server goes on"


def test_large_batches_arrive_whole(start: Starter) -> None:
    live = start()
    path = live.collection()
    body = {
        "ids": [f"id-{i}" for i in range(2_000)],
        "embeddings": np.random.default_rng(1).random((2_000, 32)).tolist(),
        "documents": ["text " * 50] * 2_000,
    }
    assert live.http.post(f"{path}/upsert", json=body).status_code == 200
    assert live.http.get(f"{path}/count").json() == 2_001


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b'{"ids":["\xff"]}', b"[" * 5_000 + b"]" * 5_000, b"\x00" * 100],
)
def test_garbage_is_400_and_the_server_goes_on(start: Starter, data: bytes) -> None:
    live = start()
    path = live.collection()
    before = len(live.world.appended)
    for verb in ("add", "upsert", "update", "delete", "get", "query"):
        answer = live.http.post(f"{path}/{verb}", content=data, headers=JSON)
        assert answer.status_code == 400
        assert answer.json()["error"] == "InvalidArgumentError"
    assert len(live.world.appended) == before
    assert live.http.get(f"{path}/count").json() == 1


def test_errors_carry_their_names(start: Starter) -> None:
    live = start()
    path = live.collection()
    unknown = f"{DATABASE}/collections/00000000-0000-4000-8000-000000000000"
    for answer, status, name in (
        (live.http.post(f"{path}/add", json={}), 422, "ChromaError"),
        (live.http.post(f"{unknown}/get", json={}), 404, "NotFoundError"),
        (live.http.get(f"{DATABASE}/collections/nope"), 404, "NotFoundError"),
        (live.http.post("/api/v2/reset"), 403, "ChromaError"),
        (live.http.post(f"{path}/fork", json={"new_name": "abc"}), 501, "ChromaError"),
    ):
        assert (answer.status_code, answer.json()["error"]) == (status, name)


# -- request ids, authentication, metrics, slow requests


def test_request_ids_are_taken_or_made(start: Starter) -> None:
    live = start()
    for given in ({"x-request-id": "abc"}, {"chroma-trace-id": "abc"}):
        answer = live.http.get("/api/v2/version", headers=given)
        assert answer.headers["x-request-id"] == answer.headers["chroma-trace-id"] == "abc"
    made = {live.http.get("/api/v2/foo").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for bad in ("x" * 129, "ä", "a\tb"):
        answer = live.http.get(
            "/api/v2/version", headers=[(b"x-request-id", bad.encode("latin-1"))]
        )
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] not in (bad, "")


def test_a_token_is_needed_where_one_is_set(start: Starter) -> None:
    live = start(FrontendConfig(token="s3cret"))
    for headers in (
        {},
        {"authorization": "s3cret"},
        {"authorization": "Basic s3cret"},
        {"authorization": "Bearer wrong"},
        {"x-chroma-token": "s3cret2"},
        {"x-chroma-token": "wrong", "authorization": "Bearer s3cret"},
    ):
        for path in (f"{DATABASE}/collections", "/api/v2/auth/identity", "/metrics", "/nope"):
            answer = live.http.get(path, headers=headers)
            assert answer.status_code == 401, (headers, path)
            assert answer.json()["error"] == "AuthorizationError"
            assert answer.headers["www-authenticate"] == "Bearer"
        post = live.http.post(f"{DATABASE}/collections/x/add", content=b"{", headers=headers)
        assert post.status_code == 401
    for headers in ({"authorization": "bearer s3cret"}, {"x-chroma-token": "s3cret"}):
        assert live.http.get(f"{DATABASE}/collections", headers=headers).status_code == 200
    for path in ("/api/v2/heartbeat", "/api/v2/healthcheck", "/docs", "/openapi.json"):
        assert live.http.get(path).status_code == 200


def test_metrics_count_by_operation_and_status(start: Starter) -> None:
    live = start()
    path = live.collection()
    live.http.post(f"{path}/get", json={})
    live.http.post(f"{path}/get", json={"limit": -1})
    live.http.get("/api/v2/version")
    live.http.get("/nope")
    wait_until(lambda: live.app.metrics.requests("unmatched", 404) == 1)
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in (
        'ochredb_requests_total{operation="collection_get",status="200"} 1',
        'ochredb_requests_total{operation="collection_get",status="422"} 1',
        'ochredb_requests_total{operation="collection_add",status="201"} 1',
        'ochredb_requests_total{operation="version",status="200"} 1',
        'ochredb_request_duration_seconds_bucket{operation="collection_get",le="+Inf"} 2',
        'ochredb_request_duration_seconds_count{operation="collection_get"} 2',
        "ochredb_requests_in_flight 1",
        "ochredb_read_pool_pending 0",
    ):
        assert line in lines


def test_slow_requests_are_logged(start: Starter, caplog: pytest.LogCaptureFixture) -> None:
    live = start(FrontendConfig(slow_request_s=0.05))
    path = live.collection()
    caplog.clear()
    live.world.before_answer = lambda _cancel: time.sleep(0.06)
    with caplog.at_level(logging.WARNING, "ochredb.frontend"):
        live.http.post(f"{path}/get", json={}, headers={"x-request-id": "slow-1"})
        wait_until(lambda: "slow-1" in caplog.text)
    assert "operation=collection_get status=200" in caplog.text


# -- overload, deadlines, disconnects, the end


def test_a_full_queue_is_429_and_leaves_the_other_pool_alone(start: Starter) -> None:
    live = start(FrontendConfig(read_threads=1, write_threads=1, queue_max=1))
    path = live.collection()
    release = threading.Event()
    blocked: list[Cancel] = []

    def block(cancel: Cancel) -> None:
        if threading.current_thread().name.startswith("ochredb-read"):
            blocked.append(cancel)
            assert release.wait(10)

    live.world.before_answer = block
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(live.http.post, f"{path}/get", json={}) for _ in range(2)]
        wait_until(lambda: "ochredb_read_pool_pending 2" in live.app.metrics.text().decode())
        refused = live.http.post(f"{path}/get", json={})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == "RateLimitError"
        assert live.http.post(f"{path}/upsert", json=ONE).status_code == 200
        release.set()
        assert [future.result().status_code for future in waiting] == [200, 200]


def until_told_to_stop(stopped: list[str]) -> Any:
    def wait(cancel: Cancel) -> None:
        try:
            while True:
                cancel.check()
                time.sleep(0.005)
        except (Cancelled, DeadlineExceeded) as error:
            stopped.append(type(error).__name__)
            raise

    return wait


def test_the_deadline_is_504(start: Starter) -> None:
    live = start(FrontendConfig(deadline_s=0.2))
    path = live.collection()
    stopped: list[str] = []
    live.world.before_answer = until_told_to_stop(stopped)
    answer = live.http.post(f"{path}/get", json={})
    assert answer.status_code == 504 and answer.json()["error"] == "ChromaError"
    wait_until(lambda: stopped == ["DeadlineExceeded"])  # The answer did not wait for the thread.


@pytest.mark.parametrize("key_is_looked_for", [True, False])
def test_what_comes_before_and_after_a_filter_has_the_request_s_end(
    start: Starter, key_is_looked_for: bool
) -> None:
    """A look for the key of a deletion, and a note that nothing was found to delete."""
    live = start(FrontendConfig(deadline_s=0.2))
    path = live.collection()
    calls: list[Cancel] = []
    stopped: list[str] = []
    wait = until_told_to_stop(stopped)

    def hold_the_last(cancel: Cancel) -> None:
        calls.append(cancel)
        if key_is_looked_for or len(calls) == 2:
            wait(cancel)

    live.world.before_answer, live.world.matching = hold_the_last, lambda _id: False
    deletion = {"where": {"n": 1}}
    headers = {"idempotency-key": "k", "x-request-id": "request-1"}
    assert live.http.post(f"{path}/delete", json=deletion, headers=headers).status_code == 504
    wait_until(lambda: stopped == ["DeadlineExceeded"])
    assert [cancel.request_id for cancel in calls] == ["request-1"] * len(calls)
    assert len(calls) == (1 if key_is_looked_for else 2)


def test_the_indexing_status_has_the_request_s_end(start: Starter) -> None:
    live = start(FrontendConfig(deadline_s=0.2))
    stopped: list[str] = []
    path = live.collection()
    live.world.before_answer = until_told_to_stop(stopped)
    assert live.http.get(f"{path}/indexing_status").status_code == 504
    wait_until(lambda: stopped == ["DeadlineExceeded"])


def test_work_that_cannot_be_stopped_is_answered_for(start: Starter) -> None:
    live = start(FrontendConfig(deadline_s=0.2))
    path = live.collection()
    release = threading.Event()

    def hold(_cancel: Cancel) -> None:
        assert release.wait(10)

    live.world.before_answer = hold
    started = time.monotonic()
    answer = live.http.post(f"{path}/upsert", json=ONE)
    assert answer.status_code == 504
    assert time.monotonic() - started < 2
    release.set()


def test_a_request_that_waited_too_long_is_not_begun(start: Starter) -> None:
    live = start(FrontendConfig(deadline_s=0.3, write_threads=1))
    path = live.collection()
    begun: list[int] = []

    def slow(_cancel: Cancel) -> None:
        begun.append(1)
        time.sleep(0.9)

    live.world.before_answer = slow
    before = len(live.world.appended)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: live.http.post(f"{path}/upsert", json=LARGE), range(2)))
    assert [answer.status_code for answer in answers] == [504, 504]
    wait_until(lambda: "ochredb_write_pool_pending 0" in live.app.metrics.text().decode())
    assert len(begun) == 1
    assert len(live.world.appended) == before + 1, "the one that had begun is applied"


def test_a_client_that_goes_away_stops_its_request(start: Starter) -> None:
    live = start(FrontendConfig(disconnect_check_s=0.01))
    path = live.collection()
    stopped: list[str] = []
    live.world.before_answer = until_told_to_stop(stopped)
    head = f"POST {path}/get HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(live.address) as sock:
        sock.sendall(f"{head}content-length: 2\r\n\r\n{{}}".encode())
        wait_until(lambda: "read_pool_pending 1" in live.app.metrics.text().decode())
    wait_until(lambda: stopped == ["Cancelled"])


def test_stopping_finishes_what_runs(start: Starter) -> None:
    live = start()
    path = live.collection()
    running = threading.Event()

    def slow(_cancel: Cancel) -> None:
        running.set()
        time.sleep(0.3)

    live.world.before_answer = slow
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(live.http.post, f"{path}/upsert", json=ONE)
        assert running.wait(5)
        live.server.stop()
        assert answer.result().status_code == 200
    live.thread.join(10)
    assert not live.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(str(live.http.base_url), trust_env=False)


def test_an_address_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already"):
            listen("127.0.0.1", port)


def pour(sock: socket.socket) -> None:
    for _ in range(200):
        sock.sendall(b"a" * 65_536)
        time.sleep(0.005)


def test_a_head_without_end_is_cut_off(start: Starter) -> None:
    live = start()
    with socket.create_connection(live.address) as sock:
        sock.settimeout(5.0)
        sock.sendall(b"GET /api/v2/heartbeat HTTP/1.1\r\nhost: x\r\nx-a: ")
        # A reset may reach us before the 431 does; without the limit, 13 MB would go through.
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            pour(sock)
    assert live.http.get("/api/v2/heartbeat", headers={"x-a": "b" * 20_000}).status_code == 200


def test_patterns_are_never_compiled_on_the_event_loop(start: Starter) -> None:
    app = start().app
    assert app._parses_quickly(b'{"where":{"a":1}}')
    assert not app._parses_quickly(b'{"where_document":{"$regex":"a"}}')
    assert not app._parses_quickly(b'{"where_document":{"$\\u0072egex":"a"}}')
